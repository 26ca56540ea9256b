"""What one solution may use."""

import math

from pydantic import Field

from qrpo.config import Section


class Limits(Section):
    """Limits of one solution. After two tests that exceed a time limit, the other tests fail."""

    cpu_seconds: float = Field(5.0, gt=0.0)
    """Processor time in seconds of one test (a call, or a program's input), all threads together:
    independent of other load."""
    total_cpu_seconds: float = Field(60.0, gt=0.0)
    """Processor time in seconds of all tests together."""
    wall_seconds: float = Field(30.0, gt=0.0)
    """Wall time in seconds of all tests together, for solutions that wait instead of computing. A
    solution that had at least a twentieth of this time as processor time may go on, since a busy
    machine starved it, for four more seconds per second of its processor time limits."""
    memory_mb: int = Field(1024, ge=64)
    """Address space in MiB."""
    tmp_mb: int = Field(16, ge=1)
    """Size of its private /tmp in MiB; it can write nowhere else."""
    file_mb: int = Field(16, ge=0)
    """Maximum file size in MiB."""
    output_mb: float = Field(4.0, gt=0.0)
    """Maximum size of what it returns or prints, in MiB; a solution that exceeds it is killed."""
    threads: int = Field(64, ge=1)
    """Threads. (Processes: always one.)"""

    def plain(self) -> dict[str, int]:
        """The limits that the kernel enforces, in bytes and whole seconds, for the jail."""
        return {
            "cpu_seconds": math.ceil(max(self.cpu_seconds, self.total_cpu_seconds)) + 2,
            "memory_bytes": self.memory_mb << 20,
            "tmp_bytes": self.tmp_mb << 20,
            "file_bytes": self.file_mb << 20,
            "threads": self.threads,
        }
