"""What one solution may use."""

from pydantic import Field

from qrpo.config import Section

__all__ = ["Limits"]


class Limits(Section):
    """Limits of one solution over all its tests (for a program: for each test)."""

    cpu_seconds: int = Field(10, ge=1)
    """Processor time in seconds, all threads together: independent of other load."""
    wall_seconds: float = Field(30.0, gt=0.0)
    """Wall time in seconds, for solutions that wait instead of computing. A solution that had at
    least a twentieth of this time as processor time may go on: a busy machine starved it."""
    memory_mb: int = Field(512, ge=64)
    """Address space in MiB."""
    tmp_mb: int = Field(16, ge=1)
    """Size of its private /tmp in MiB; it can write nowhere else."""
    file_mb: int = Field(16, ge=0)
    """Maximum file size in MiB."""
    output_mb: float = Field(4.0, gt=0.0)
    """Maximum size of what it returns or prints, in MiB; a solution that exceeds it is killed."""
    threads: int = Field(64, ge=1)
    """Threads. (Processes: always one.) If root runs the pipeline the kernel does not count them;
    memory_mb then limits them."""

    def plain(self) -> dict[str, int | float]:
        """The limits in bytes and seconds, for the jail."""
        return {
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "memory_bytes": self.memory_mb << 20,
            "tmp_bytes": self.tmp_mb << 20,
            "file_bytes": self.file_mb << 20,
            "threads": self.threads,
        }
