"""The paper's comparisons on one small machine."""
