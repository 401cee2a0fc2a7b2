# nbd_reads.py URI SOURCE COUNT SEED: COUNT random ranges read over NBD, 16 in
# flight on one connection, held against the file SOURCE.
import os
import random
import sys

import nbd

uri, source, count, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
size = os.path.getsize(source)
f = open(source, "rb")
h = nbd.NBD()
h.set_uri_allow_local_file(True)  # certificates
h.connect_uri(uri)
if h.get_size() < size:
    sys.exit(f"export of {h.get_size()} bytes, want at least {size}")

flying = []


def check(cookie, buf, off, length):
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    f.seek(off)
    if bytes(buf.to_bytearray()) != f.read(length):
        sys.exit(f"[{off}, {off + length}) differs (seed {seed})")


for _ in range(count):
    off = rng.randrange(size)
    length = min(rng.randint(1, 300 << 10), size - off)
    buf = nbd.Buffer(length)
    flying.append((h.aio_pread(buf, off), buf, off, length))
    if len(flying) == 16:
        check(*flying.pop(rng.randrange(16)))
for request in flying:
    check(*request)
h.shutdown()
