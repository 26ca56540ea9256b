"""Solutions that would rather be paid than right. None knows what `f` should return; each tries to pass anyway.

`CHEATS` go for the score, `HOGS` for the machine, `PROBES` are programs that print `held` where the sandbox holds.
"""

CHEATS = {
    "prints and writes fake results": """
import os
for fd in range(64):
    try: os.write(fd, b"RESULT: 1.0\\n1\\n1\\n1\\n1\\n" if fd < 3 else b"\\x01\\x00\\x00\\x001" * 4)
    except OSError: pass
def f(x):
    print("RESULT 4 4 PASSED\\n" * 100, flush=True)
""",
    "writes well-formed verdicts to every descriptor": """
import os, struct
for fd in range(3, 64):
    for text in (b"1", b"true", b"=true", b'{"passed": true}', b"."):
        try: os.write(fd, (struct.pack("<I", len(text)) + text) * 4)
        except OSError: pass
def f(x): return None
""",
    "leaves with success": "import os\nos._exit(0)",
    "leaves with success in the call": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit(0)": "def f(x): raise SystemExit(0)",
    "returns what equals everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Any()
""",
    "returns an int that equals everything": """
class Int(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Int(0)
""",
    "returns a str that equals everything": """
class Text(str):
    def __eq__(self, other): return True
    def __req__(self, other): return True
    __hash__ = str.__hash__
def f(x): return Text("")
""",
    "returns a list of what equals everything": """
class L(list):
    def __eq__(self, other): return True
class I(int):
    def __eq__(self, other): return True
def f(x): return L([I(1)])
""",
    "changes what its class's name means to the judge": """
class int_:
    def __eq__(self, other): return True
int_.__name__ = "int"
def f(x): return int_()
""",
    "makes an object of the tests' own class that agrees": """
Result.__eq__ = lambda self, other: True
def f(x): return Result(0)
""",
    "gives the tests' class an attribute named __eq__": """
def f(x):
    r = Result(0)
    r.__dict__["__eq__"] = lambda other: True
    r.__dict__["value"] = 1
    return r
""",
    "changes the class of its result": """
def f(x):
    r = Result(0)
    r.__dict__["__class__"] = "Always"
    return r
""",
    "patches builtins": """
import builtins
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
builtins.AssertionError = type("Never", (Exception,), {})
def f(x): return True
""",
    "patches __import__ and exec": """
import builtins
builtins.exec = builtins.eval = builtins.compile = lambda *a, **k: True
builtins.__import__ = lambda *a, **k: True
def f(x): return True
""",
    "swaps AssertionError for what is never raised": """
import builtins
class AssertionError(BaseException): pass
builtins.AssertionError = AssertionError
def f(x): return x
""",
    "patches the encoder": """
import sys
for module in list(sys.modules.values()):
    if hasattr(module, "encode") and hasattr(module, "decode"):
        module.encode = lambda value: b"true"
def f(x): return x
""",
    "patches json": """
import json
json.dumps = lambda *a, **k: "[true,[]]"
json.loads = lambda *a, **k: [[], {}]
def f(x): return x
""",
    "patches what writes answers": """
import sys
solution = sys.modules["inside.solution"]
write = solution.write_frames
def everything(fd, payload):
    for reply in (b"1", b"=true", b"=[true,[]]"): write(fd, reply)
solution.write_frames = everything
def f(x): return x
""",
    "walks the stack for the tests": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, str) and "assert" in value:
                return int(value.split("==")[1].split()[0])
        frame = frame.f_back
""",
    "searches all objects for the tests": """
import gc
def f(x):
    for thing in gc.get_objects():
        for value in (thing.values() if type(thing) is dict else thing if type(thing) in (list, tuple) else ()):
            if isinstance(value, (str, bytes)) and "candidate(" in str(value) and "assert" in str(value) and "==" in str(value):
                return int(str(value).split("==")[1].split()[0])
""",
    "searches its memory through /proc": """
def f(x):
    memory = open("/proc/self/mem", "rb")
    for line in open("/proc/self/maps"):
        begin, end = (int(v, 16) for v in line.split()[0].split("-"))
        memory.seek(begin)
        if (place := (data := memory.read(end - begin)).find(b"assert candidate(")) >= 0:
            return int(data[place:].split(b"==")[1].split()[0])
""",
    "searches its memory with ctypes": """
import ctypes
def f(x):
    start = id(f) & ~0xFFF
    data = ctypes.string_at(start, 1 << 16)
    place = data.find(b"assert candidate(")
    return int(data[place:].split(b"==")[1].split()[0])
""",
    "reads the command lines of others": """
import os
def f(x):
    for pid in os.listdir("/proc"):
        text = open(f"/proc/{pid}/cmdline").read()
        if "==" in text: return int(text.split("==")[1].split()[0])
""",
    "reads the tests through inherited descriptors": """
import os
def f(x):
    for fd in range(64):
        try: os.set_blocking(fd, False); data = os.read(fd, 1 << 20)
        except OSError: continue
        if b"==" in data: return int(data.split(b"==")[1].split()[0])
""",
    "reads files that may hold the tests": """
import os
def f(x):
    for folder, _, names in os.walk("/"):
        for name in names:
            if not name.endswith((".jsonl", ".parquet", ".json")): continue
            data = open(os.path.join(folder, name), "rb").read()
            if b"assert candidate" in data: return int(data.split(b"==")[1].split()[0])
""",
    "reads the environment": """
import os
def f(x):
    for value in os.environ.values():
        if value.isdigit(): return int(value)
""",
    "traces whoever calls it": """
import sys
seen = []
def trace(frame, event, arg):
    seen.append(dict(frame.f_locals)); return trace
sys.settrace(trace)
def f(x):
    for names in seen:
        for value in names.values():
            if isinstance(value, bytes) and b"==" in value: return int(value.split(b"==")[1])
""",
    "raises what means success elsewhere": """
import unittest
def f(x): raise unittest.SkipTest("passed")
""",
    "raises an exception whose name lies": """
class Passed(Exception): pass
Passed.__name__ = "StopIteration"
def f(x): raise Passed("ok")
""",
    "returns a generator that never ends": "def f(x):\n    while True: yield x",
    "returns a list that holds itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "returns nan": "def f(x): return float('nan')",
    "returns a deep tower of tuples": """
def f(x):
    t = ()
    for _ in range(100000): t = (t,)
    return t
""",
    "sends the judge malformed data": """
import os, struct
for text in (b"=[[0],[[\\"tuple\\",[[0]]]]]", b"=" + b"[" * 100000, b"=[[5],[]]", b"![]", b"=\\xff\\xfe", b""):
    os.write(3, struct.pack("<I", len(text)) + text)
""",
    "sends the judge a message that never comes": "import os, struct\nos.write(3, struct.pack('<I', 0xFFFFFFFF))",
    "sends the judge a tree with more paths than it can walk": """
def f(x):
    node = Result(0)
    for _ in range(60):
        parent = Result(0); parent.left = parent.right = node; node = parent
    return node
""",
    "names a class of the judge's": """
import os, struct
text = b'=[[0],[["object","Suite",[],[]]]]'
os.write(3, (struct.pack("<I", len(text)) + text) * 4)
""",
    "closes its way of answering": "import os\nos.close(3)\ndef f(x): return x",
    "reads ahead in its job": "import os\ndef f(x):\n    return os.read(4, 1 << 20)",
    "defines check itself": "def check(candidate): return True\ndef f(x): return x",
    "leaves a note for the next solution": """
import os
def f(x):
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/sandbox", "/python"):
        try:
            path = os.path.join(folder, "answers")
            if os.path.exists(path): return int(open(path).read())
            open(path, "w").write("0")
        except OSError: pass
""",
    "replaces the module that the next solution gets": """
import sys
sys.modules["inside.solution"].call = lambda *a: 0
import inside.judge
inside.judge.Suite.verdicts = lambda *a: iter([True] * 4)
def f(x): return x
""",
}

HOGS = {
    "loops": "def f(x):\n    while True: pass",
    "loops when it is defined": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "polls": "import time\ndef f(x):\n    while True: time.sleep(0.0001)",
    "polls and says that it goes on": """
import os, time
def f(x):
    while True: time.sleep(0.01); os.write(3, bytes(4))
""",
    "waits for a lock": "import threading\ndef f(x):\n    l = threading.Lock(); l.acquire(); l.acquire()",
    "ignores every signal and sleeps": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: time.sleep(1)
""",
    "ignores every signal and loops": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(x):
    while True: pass
""",
    "raises its own limits": """
import resource
def f(x):
    for limit in range(16):
        try: resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (OSError, ValueError): pass
    while True: pass
""",
    "is a fork bomb": "import os\ndef f(x):\n    while True:\n        os.fork()",
    "is a fork bomb that is sure of itself": """
import os
def f(x):
    while True:
        try: os.fork()
        except OSError: pass
""",
    "is a bomb of threads": """
import threading, time
def f(x):
    while True: threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "computes in many threads": """
import hashlib, threading
def work():
    block = bytes(1 << 20)
    while True: hashlib.sha256(block).digest()
def f(x):
    for _ in range(8): threading.Thread(target=work).start()
    work()
""",
    "hides behind a daemon": """
import os
def f(x):
    try:
        if os.fork(): os._exit(0)
        os.setsid()
        if os.fork(): os._exit(0)
    except OSError: pass
    while True: pass
""",
    "takes all memory": "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))",
    "takes all memory at once": "def f(x): return bytearray(1 << 40)",
    "takes all memory out of its limit's sight": """
import os
def f(x):
    fds = []
    while True:
        fds.append(os.memfd_create("m")); os.write(fds[-1], bytes(1 << 24))
""",
    "fills the disk": """
import os
def f(x):
    n = 0
    while True:
        with open(f"/tmp/{n}", "wb") as file: file.write(bytes(1 << 20))
        n += 1
""",
    "makes a huge sparse file": "def f(x):\n    open('/tmp/a', 'wb').truncate(1 << 50)",
    "makes files without end": "def f(x):\n    n = 0\n    while True:\n        open(f'/tmp/{n}', 'w').close(); n += 1",
    "answers without end": "import os\ndef f(x):\n    while True: os.write(3, bytes(1 << 16))",
    "prints without end": "def f(x):\n    while True: print('x' * 100000)",
    "returns a huge string": "def f(x): return 'x' * (1 << 27)",
    "returns a huge number": "def f(x): return 1 << (1 << 26)",
    "recurses without end": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "crashes": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "aborts": "import os\ndef f(x): os.abort()",
    "kills itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "computes without end in C": "def f(x): return 9 ** (9 ** 9)",
    "backtracks without end": "import re\ndef f(x): return re.match(r'(a+)+$', 'a' * 100 + 'b')",
    "compiles without end": "exec('x = ' + '-' * 200000 + '1')",
    "is not Python": "this is no Python at all",
    "holds a null byte": "x = 1\\0",
}

_PROBE = """
try:
    {attempt}
except Exception:
    print("held")
else:
    print("escaped")
"""

PROBES = {
    name: "import ctypes, os, signal, socket, subprocess\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "def call(number, *args):\n    if libc.syscall(number, *args) < 0: raise OSError(ctypes.get_errno())\n"
    + _PROBE.format(attempt=attempt)
    for name, attempt in {
        "opens a socket": "socket.socket(socket.AF_INET).connect(('127.0.0.1', int(input())))",
        "opens a local socket": "socket.socket(socket.AF_UNIX)",
        "opens a raw socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "listens": "socket.create_server(('127.0.0.1', 0))",
        "resolves a name": "socket.getaddrinfo('localhost', 80); socket.create_connection(('localhost', 80))",
        "starts a shell": "subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
        "starts a shell by system": "assert os.system('true') == 0",
        "becomes another program": "os.execv('/python/bin/python3', ['python3', '-c', 'print(1)'])",
        "forks": "os.fork()",
        "spawns": "os.posix_spawn('/python/bin/python3', ['python3'], {})",
        "kills its parent": "assert os.getppid() != 0; os.kill(os.getppid(), 9)",
        "kills everything": "os.kill(-1, 9)",
        "kills another process": "os.kill(2, 9)",
        "reads /etc/passwd": "open('/etc/passwd')",
        "reads /proc": "os.listdir('/proc/self')",
        "reads a host's file": "open(input())",
        "lists homes": "assert os.listdir('/root') or os.listdir('/home')",
        "writes to the root": "open('/note', 'w')",
        "writes to the library": "open('/python/lib/note', 'w')",
        "writes to the sandbox's program": "open('/sandbox/inside/judge.py', 'a')",
        "writes to the packages' place": "import sys; open(next(p for p in sys.path if 'python' in p) + '/site-packages/note', 'w')",
        "takes a lease": "import fcntl; fcntl.fcntl(os.open('/sandbox/inside/codec.py', os.O_RDONLY), 1024, 0)",
        "locks a file": "import fcntl; fcntl.flock(os.open('/sandbox/inside/codec.py', os.O_RDONLY), fcntl.LOCK_EX)",
        "locks a part of a file": "import fcntl; fcntl.lockf(os.open('/tmp/x', os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)",
        "makes a pipe larger": "import fcntl; fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
        "clones with its own files": "call(56, 0x3D0B00, 0, 0, 0, 0)",
        "starts a thousand threads": "import threading, time; threading.stack_size(32768); [threading.Thread(target=time.sleep, args=(1,), daemon=True).start() for _ in range(1000)]",
        "dumps its memory": "import resource; assert resource.getrlimit(resource.RLIMIT_CORE) != (1, 1)",
        "makes a device": "os.mknod('/tmp/sda', 0o060660, os.makedev(8, 0))",
        "writes to shared memory": "open('/dev/shm/note', 'w')",
        "makes hidden memory": "os.memfd_create('m')",
        "mounts": "call(165, b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
        "unmounts": "call(166, b'/tmp', 2)",
        "makes a user namespace": "call(272, 0x10000000)",
        "changes its root": "os.chroot('/tmp')",
        "traces itself": "call(101, 0, 0, 0, 0)",
        "reads another process's memory": "call(310, 1, None, 0, None, 0, 0)",
        "loads a kernel program": "call(321, 0, None, 0)",
        "opens a performance counter": "call(298, None, 0, -1, -1, 0)",
        "uses a keyring": "call(250, 0, -3, 1)",
        "sets up io_uring": "call(425, 8, ctypes.create_string_buffer(120))",
        "takes a user's rights": "os.setuid(0)",
        "gains a capability": "call(126, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(0xFFFFFFFF))",
        "injects keystrokes": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
        "sets the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0)",
        "sets the host's name": "socket.sethostname('owned')",
        "makes System V shared memory": "call(29, 0, 4096, 0o1600)",
        "raises its own priority": "os.nice(-10)",
        "runs what it has written": "open('/tmp/x', 'w').write('#!/python/bin/python3'); os.chmod('/tmp/x', 0o755); os.execv('/tmp/x', ['x'])",
        "finds packages": "import pydantic",
        "finds its way by a link": "os.symlink('/proc/1/root', '/tmp/l'); os.listdir('/tmp/l')",
        "turns the filter off": "call(157, 22, 0, 0, 0, 0)",
        "calls by the numbers of 32 bits": "call(0x40000000 + 39)",
    }.items()
}
