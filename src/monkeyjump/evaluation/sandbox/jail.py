"""The inside of the sandbox: a program of its own, which the parent starts with `python -I -S jail.py`.

    parent -> A  makes the namespaces, waits
              A -> B  process 1 of the new process namespace: builds the file system, waits
                   B -> C  without rights and under limits: runs the untrusted program

When the parent kills A's process group, B dies, and the kernel kills everything in B's process namespace with it,
however it has forked, detached or blocked signals.

stdin: JSON {program, root, libraries, limits}. stdout: JSON {passed, reason, token}, or {refused, token}. The token
is written after the program has come to its end. Standard library only: the interpreter starts without
site-packages.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 2, 4, 4096, 8192, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
REASON = 300  # characters

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """A libc function that returns 0, or OSError naming it."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(f"{name}: {os.strerror(number)}")


def control(option, value):
    call("prctl", option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def mount(source, target, kind, flags, data=None):
    encoded = (None if text is None else text.encode() for text in (source, target, kind))
    call("mount", *encoded, ctypes.c_ulong(flags), data if data is None else data.encode())


def separate():
    """New namespaces for network, mounts, processes and IPC; a user namespace where that takes one."""
    flags = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.getuid(), os.getgid()
    if user == 0:
        call("unshare", flags)
        return
    call("unshare", flags | CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(root, libraries, size):
    """A file system with the interpreter's libraries, read-only, and an empty /tmp: nothing else of the machine."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=4096,mode=755")
    for path in libraries:
        inside = root + path
        if not os.path.exists(inside):  # not already inside another one
            os.makedirs(inside)
            mount(path, inside, None, MS_BIND | MS_REC)
            read_only(inside)
    os.mkdir(root + "/tmp")
    os.chmod(root + "/tmp", 0o1777)
    os.chdir(root)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/tmp")


def read_only(path):
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, size)


def give_up_rights(limits):
    """Nobody instead of root, no capability, nothing to be gained by exec, and the limits."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    call("capset", header, none)
    control(PR_SET_NO_NEW_PRIVS, 1)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


def run(program, verdict, token):
    """Execute the program; only coming to its end counts as passing, whatever way out it tries."""
    try:
        exec(compile(program, "answer", "exec"), {"__name__": "answer"})
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too: they are raised by the program
        reason = f"{type(error).__name__}: {error}".strip(": ")[:REASON]
        os.write(verdict, json.dumps({"passed": False, "reason": reason}).encode())
    else:
        os.write(verdict, json.dumps({"passed": True, "reason": "", "token": token}).encode())
    os._exit(0)


def first_process(job, verdict):
    """B: builds the file system, starts C, waits for it and says how it ended."""
    control(PR_SET_PDEATHSIG, signal.SIGKILL)
    control(PR_SET_DUMPABLE, 0)
    nowhere = os.open("/dev/null", os.O_RDWR)  # the new file system has none
    build_root(job["root"], job["libraries"], job["limits"]["FSIZE"] * 4)
    child = os.fork()
    if child == 0:
        os.setsid()  # what it sends to its process group stays in here
        for stream in range(3):
            os.dup2(nowhere, stream)
        give_up_rights(job["limits"])
        leave = os._exit  # the program may put something else there
        try:
            run(job["program"], verdict, job["token"])
        finally:  # also where an exception of the program cannot even be printed: nothing may reach `refuse`
            leave(1)
    os.close(verdict)
    while True:
        found, status = os.wait()
        if found == child:
            return os.waitstatus_to_exitcode(status)


def refuse(verdict, job, error):
    os.write(verdict, json.dumps({"refused": str(error), "token": job["token"]}).encode())
    return 1


def main():
    job = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    os.set_inheritable(verdict, False)
    try:
        separate()
        child = os.fork()
    except OSError as error:
        return refuse(verdict, job, error)
    if child == 0:
        try:
            code = first_process(job, verdict)
        except OSError as error:
            code = refuse(verdict, job, error)
        os._exit(code if code >= 0 else 128 - code)
    os.close(verdict)
    os.close(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
