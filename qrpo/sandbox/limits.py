"""What one solution may use."""

from pydantic import Field

from qrpo.config import Section

__all__ = ["Limits"]


class Limits(Section):
    """Limits of one solution, over all its tests together (a program read from standard input: for each test)."""

    cpu_seconds: int = Field(10, ge=1)
    """Processor time in seconds, all threads together. It decides, so a verdict does not hang on how busy the machine is."""
    wall_seconds: float = Field(30.0, gt=0.0)
    """Time on the clock in seconds, for those that wait instead of computing. One that computes may go on past
    it, since a busy machine has starved it: as long as it has had a twentieth of the time as processor time."""
    memory_mb: int = Field(512, ge=64)
    """Address space in MiB."""
    tmp_mb: int = Field(16, ge=1)
    """Size of its own /tmp in MiB; it can write nowhere else."""
    file_mb: int = Field(16, ge=0)
    """Largest file in MiB."""
    output_mb: float = Field(4.0, gt=0.0)
    """What it may return or print, in MiB; more, and it is ended."""
    threads: int = Field(64, ge=1)
    """Threads. (Processes: one, always.) Where root runs the pipeline the kernel does not count them, and memory_mb is the limit."""

    def plain(self) -> dict[str, int | float]:
        """In bytes and seconds, for the cells."""
        return {
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "memory_bytes": self.memory_mb << 20,
            "tmp_bytes": self.tmp_mb << 20,
            "file_bytes": self.file_mb << 20,
            "threads": self.threads,
        }
