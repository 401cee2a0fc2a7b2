"""Drives a server through libnbd with its checks switched off.

usage: torture.py URI FILE

FILE holds the bytes that the export must have.
"""
import errno
import sys

import nbd

uri, path = sys.argv[1:]
content = open(path, "rb").read()
size = len(content)


def connect(structured=True, context=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    if context:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    assert h.get_size() == size, h.get_size()
    assert h.get_structured_replies_negotiated() == structured
    return h


def fails(want, command, *args, **kwargs):
    try:
        command(*args, **kwargs)
    except nbd.Error as e:
        assert e.errnum == want, f"{command.__name__}{args}: got {e.errno}, want {errno.errorcode[want]}"
    else:
        raise AssertionError(f"{command.__name__}{args}: did not fail")


for structured in (True, False):
    h = connect(structured, structured)
    assert h.is_read_only() and h.can_multi_conn() and h.can_flush() and h.can_cache()
    assert not (h.can_trim() or h.can_zero() or h.can_fua() or h.can_fast_zero() or h.is_rotational())
    assert h.can_df() == structured
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) == structured
    assert [h.get_block_size(i) for i in range(3)] == [1, 65536, 32 << 20]

    for _ in range(2):  # the connection survives all of it
        assert h.pread(size, 0) == content
        assert h.pread(1, size - 1) == content[-1:]
        fails(errno.EINVAL, h.pread, 1, size)
        fails(errno.EINVAL, h.pread, 2, size - 1)
        fails(errno.EINVAL, h.pread, 512, 2**63 - 512)
        fails(errno.EINVAL, h.pread, 512, 0, flags=nbd.CMD_FLAG_FUA)
        fails(errno.EPERM, h.pwrite, b"x" * 4096, 0)
        fails(errno.EPERM, h.pwrite, b"x" * 4096, size)
        fails(errno.EPERM, h.trim, 2**31, 0)
        fails(errno.EPERM, h.zero, 2**31, 0)
        fails(errno.EPERM, h.zero, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
        fails(errno.EINVAL, h.cache, 512, size)
        h.cache(size, 0)
        h.flush()
        found = []
        status = lambda context, offset, extents, error: found.extend(extents)
        if structured:
            h.block_status(size, 0, status)
            assert sum(found[::2]) == size, found
            fails(errno.EINVAL, h.block_status, 512, size, status)
            assert h.pread(size, 0, flags=nbd.CMD_FLAG_DF) == content
        else:
            fails(errno.EINVAL, h.block_status, 512, 0, status)

    # Hundreds of requests at once, good and bad.
    reads = []
    for i in range(500):
        offset = i * 3001 % size
        buffer = nbd.Buffer(4096)
        reads.append((h.aio_pread(buffer, offset), buffer, offset))
    while h.aio_in_flight():
        h.poll(-1)
    for cookie, buffer, offset in reads:
        if offset + 4096 <= size:
            assert h.aio_command_completed(cookie)
            assert buffer.to_bytearray() == content[offset : offset + 4096], offset
        else:
            fails(errno.EINVAL, h.aio_command_completed, cookie)
    h.shutdown()

# Option mode: a look at one export does not lead into another.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_info()
h.set_export_name("missing")
fails(errno.ENOENT, h.opt_go)
names = []
h.opt_list(lambda name, description: names.append((name, description)))
assert names == [("the disk", "for tests")], names
h.set_export_name(names[0][0])
h.opt_go()
assert h.pread(512, 0) == content[:512]
h.shutdown()
