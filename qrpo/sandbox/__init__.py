"""Run code that a model wrote, and test it without letting it see the tests' answers.

    sandbox     `Sandbox`: solutions and tests in, verdicts out
    limits      what one solution may use
    jail        one bubblewrap jail, controlled from the host
    isolator    the command line of bubblewrap
    inside      what runs in the jail

    with Sandbox() as sandbox:
        (verdict,) = sandbox.judge([(code, CheckTests(test, entry_point="Solution().twoSum"))])

Three kinds of processes take part, and each trusts only those above it:

    host        this process: transfers bytes, runs no foreign code
    judge       runs the tests, in a jail; the candidate that the tests call is a proxy
    solution    runs the code in another jail, in a new process; receives only the arguments of
                calls

What a solution returns is data (`qrpo.sandbox.inside.codec`), and the comparison happens in another
process. There is no result to forge, no expected value to read and no comparison to patch: only the
right answer passes a test.

A jail runs a zygote: an interpreter with the imports done, which is forked for every job.
`isolator`, `inside.isolation` and `inside.seccomp` say what isolates the jail and the forked
processes.
"""

from qrpo.sandbox.limits import Limits
from qrpo.sandbox.sandbox import CheckTests, ProgramTests, Sandbox, Verdict

__all__ = ["CheckTests", "Limits", "ProgramTests", "Sandbox", "Verdict"]
