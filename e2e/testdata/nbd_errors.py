"""Asks an NBD server for what it must refuse, with libnbd's checks switched off.

usage: nbd_errors.py URI SOURCE

SOURCE holds the bytes that the export must have, before and after; more than
32 MiB.

Source of the errors: NBD doc/proto.md, "Error values" and the commands.
"""
import errno
import itertools
import sys

import nbd

uri, source = sys.argv[1:]
content = open(source, "rb").read()
size = len(content)
flags = [nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 1 << 5, 1 << 15]


def fails(want, command, *args):
    name = f"{command.__name__}{tuple(a if not isinstance(a, bytes) else len(a) for a in args)}"
    try:
        command(*args)
    except nbd.Error as e:
        if e.errnum != want:
            sys.exit(f"{name}: got {e.errno}, want {errno.errorcode[want]}")
    else:
        sys.exit(f"{name} did not fail")


def connect(structured):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_uri_allow_local_file(True)  # the certificates
    h.connect_uri(uri)
    return h


def status(*args):
    return 0


def bad_flags(command, args, allowed):
    """The command with each set of one or two flags of which one is not allowed."""
    for a, b in itertools.combinations_with_replacement(flags, 2):
        if (a | b) & ~allowed:
            fails(errno.EINVAL, command, *args, a | b)


def reads(h, structured):
    too_long = errno.EOVERFLOW if structured else errno.EINVAL
    fua = nbd.CMD_FLAG_FUA if h.can_fua() else 0  # "valid for all commands" then
    df = nbd.CMD_FLAG_DF if structured else 0
    for past in [(1, size), (2, size - 1), (512, 2**63 - 512), (512, 2**64 - 512), (size, 1)]:
        fails(errno.EINVAL, h.pread, *past)
        fails(errno.EINVAL, h.cache, *past)
    fails(too_long, h.pread, (32 << 20) + 1, 0)
    bad_flags(h.pread, (512, 0), fua | df)
    bad_flags(h.cache, (512, 0), fua)
    bad_flags(h.flush, (), fua)
    if structured:
        fails(errno.EINVAL, h.block_status, 512, size, status)
        fails(errno.EINVAL, h.block_status, size, 512, status)
        bad_flags(h.block_status, (512, 0, status), fua | nbd.CMD_FLAG_REQ_ONE)
    else:
        fails(errno.EINVAL, h.block_status, 512, 0, status)


def writes(h):
    fua = nbd.CMD_FLAG_FUA
    block = b"x" * 512
    for past in [size, size - 511, 2**63 - 512, 2**64 - 512]:
        fails(errno.ENOSPC, h.pwrite, block, past)
        fails(errno.ENOSPC, h.zero, 512, past)
        fails(errno.EINVAL, h.trim, 512, past)
    fails(errno.ENOSPC, h.zero, 2**32 - 1, 0)
    fails(errno.EINVAL, h.trim, 2**32 - 1, 0)
    bad_flags(h.pwrite, (block, 0), fua)
    bad_flags(h.trim, (512, 0), fua)
    bad_flags(h.zero, (512, 0), fua | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)


def refused_writes(h):
    fails(errno.EPERM, h.pwrite, b"x" * 512, 0)
    fails(errno.EPERM, h.pwrite, b"x" * 512, size)
    fails(errno.EPERM, h.zero, 2**32 - 1, 0)
    fails(errno.EPERM, h.trim, 2**32 - 1, 0)


for structured in (True, False):
    h = connect(structured)
    if h.get_size() != size:
        sys.exit(f"got {h.get_size()} bytes, want {size}")
    reads(h, structured)
    if h.is_read_only():
        refused_writes(h)
    else:
        writes(h)
    h.flush()
    # It is the same connection, and nothing has changed.
    if b"".join(h.pread(min(16 << 20, size - i), i) for i in range(0, size, 16 << 20)) != content:
        sys.exit("the export's content differs")
    h.shutdown()
