"""A sandbox for code that a model wrote, and tests of it whose answers the code cannot see.

    with Sandbox() as sandbox:
        (verdict,) = sandbox.judge([(code, CheckTests(test, entry_point="Solution().twoSum"))])

Three kinds of process take part, and each trusts only the one above it:

    host      this process: carries bytes, runs nothing
    judge     runs the tests, in a jail; the candidate it calls is a stand-in
    solution  runs the code, in another jail, in a cell of its own; is told the arguments of calls, and nothing else

What the solution hands back is data (`qrpo.sandbox.inside.codec`), and the comparison is made where it cannot reach. There is
no result to forge, no expected value to read and no comparison to patch: the only way to pass a test is to give the
right answer. The isolator is bubblewrap; see `qrpo.sandbox.isolator`, `.inside.cell` and `.inside.seccomp` for what holds.
"""

from qrpo.sandbox.limits import Limits
from qrpo.sandbox.sandbox import CheckTests, ProgramTests, Sandbox, Verdict

__all__ = ["CheckTests", "Limits", "ProgramTests", "Sandbox", "Verdict"]
