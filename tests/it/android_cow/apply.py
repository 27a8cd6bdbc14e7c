#!/usr/bin/env python3
"""Android COW by its description alone: lists operations, and rebuilds the new disk.

apply.py ops FILE            one JSON line for each operation
apply.py build BASE FILE OUT the disk that FILE makes of BASE, also merged in part
apply.py merge BASE FILE     the same in place and in merge order, as a phone does
                             without its scratch area: wrong where the order is unsafe

Written from the format's description and not from the reader that it tests.
"""

import json
import struct
import sys
import zlib

BLOCK = 4096
MAGIC = 0x436F77634F572121
COPY, REPLACE, ZERO, LABEL, CLUSTER, XOR, SEQUENCE, FOOTER = 1, 2, 3, 4, 5, 6, 7, 255
NAMES = {1: "copy", 2: "replace", 3: "zero", 4: "label", 5: "cluster", 6: "xor",
         7: "sequence", 255: "footer"}


def fail(text):
    sys.exit("apply.py: " + text)


def unlz4(data, size):
    out, at = bytearray(), 0

    def more(length):
        nonlocal at
        if length == 15:
            while True:
                byte = data[at]
                at += 1
                length += byte
                if byte != 255:
                    break
        return length

    while at < len(data):
        token = data[at]
        at += 1
        literals = more(token >> 4)
        out += data[at:at + literals]
        at += literals
        if at >= len(data):
            break
        back = data[at] | data[at + 1] << 8
        at += 2
        length = more(token & 15) + 4
        if back == 0 or back > len(out):
            fail("lz4 looks back too far")
        for _ in range(length):
            out.append(out[-back])
    return bytes(out)


def unpack(algorithm, data, size, version):
    if algorithm == 0:
        return data
    if len(data) == size and (version == 3 or algorithm in (3, 4)):
        return data
    if algorithm == 1:
        return zlib.decompress(data)
    if algorithm == 2:
        import brotli
        return brotli.decompress(data)
    if algorithm == 3:
        return unlz4(data, size)
    if algorithm == 4:
        try:
            import zstandard
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        except ImportError:
            from compression import zstd
            return zstd.decompress(data)
    fail("compression %d" % algorithm)


class Cow:
    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = file.read()
        head = struct.unpack_from("<QHHHHHIIQI", self.data)
        (magic, self.version, _, self.header, self.footer, self.op_size, block,
         self.cluster, self.merged, self.scratch) = head
        if magic != MAGIC or block != BLOCK:
            fail("no header")
        self.sequence = []
        self.ops = []
        if self.version == 3:
            self.read3()
        else:
            self.read2()

    def read3(self):
        if (self.header, self.op_size, self.footer, self.cluster) != (78, 16, 0, 0):
            fail("header of version 3")
        (count, labels, most_labels, ops, most, self.algorithm, ceiling) = struct.unpack_from(
            "<QIIQQII", self.data, 38)
        at = self.header + self.scratch
        self.sequence = list(struct.unpack_from("<%dI" % count, self.data, at))
        at += 4 * count + 16 * most_labels
        running = at + 16 * most
        for index in range(ops):
            length, new, info = struct.unpack_from("<IIQ", self.data, at + 16 * index)
            kind, bits, source = info >> 60, info >> 57 & 7, info & (1 << 48) - 1
            if info >> 48 & 0x1FF:
                fail("reserved bits of operation %d" % index)
            size = BLOCK << bits
            if size > max(ceiling, BLOCK):
                fail("operation %d is larger than the header says" % index)
            if kind == REPLACE and source != running:
                fail("operation %d: data at %d, not %d" % (index, source, running))
            if kind not in (COPY, REPLACE, ZERO, XOR) or (bits and kind != REPLACE):
                fail("operation %d of type %d" % (index, kind))
            self.ops.append((kind, self.algorithm, new, 1 << bits, source, running, length))
            running += length
        if running > len(self.data):
            fail("data past the end")

    def read2(self):
        if (self.op_size, self.footer) != (20, 84) or self.cluster == 1:
            fail("header of version 2")
        at = self.header + self.scratch
        running = at + 20 * (self.cluster or 1)
        left, seen = self.cluster, 0
        while True:
            kind, algorithm, length, new, source = struct.unpack_from("<BBHQQ", self.data, at)
            if kind == FOOTER:
                if (new, source) != (seen * 20, seen):
                    fail("footer says %d operations in %d bytes, %d seen" % (source, new, seen))
                if at + 84 != len(self.data) or length != 64:
                    fail("footer is not the end")
                return
            seen += 1
            at += 20
            left -= 1
            self.ops.append((kind, algorithm, new, 1, source, running, length))
            if kind == SEQUENCE:
                if source != running or length % 4:
                    fail("sequence data")
                self.sequence += struct.unpack_from("<%dI" % (length // 4), self.data, source)
            if kind == REPLACE and source != running:
                fail("data of block %d at %d, not %d" % (new, source, running))
            if kind in (REPLACE, XOR, SEQUENCE):
                running += length
                if not self.cluster:
                    at += length
            if not self.cluster:
                running += 20
            if kind == CLUSTER:
                at += source
                running += 20 * self.cluster
                if running != at + 20 * self.cluster:
                    fail("a cluster operation says %d" % source)
                left = self.cluster
            elif self.cluster and left == 0:
                fail("a cluster without its operation")

    def made(self):
        return [op for op in self.ops if op[0] in (COPY, REPLACE, ZERO, XOR)]

    def content(self, op, base):
        kind, algorithm, _, blocks, source, running, length = op
        if kind == ZERO:
            return bytes(BLOCK)
        if kind == COPY:
            return bytes(base[source * BLOCK:(source + 1) * BLOCK])
        data = unpack(algorithm, self.data[running:running + length], blocks * BLOCK,
                      self.version)
        if len(data) != blocks * BLOCK:
            fail("block %d decodes to %d bytes" % (op[2], len(data)))
        if kind == XOR:
            old = base[source:source + BLOCK]
            data = bytes(a ^ b for a, b in zip(data, old))
        return data

    def ready(self):
        """Blocks of a window that a merge had ready, from the scratch area."""
        start, blocks = self.header, {}
        if not self.scratch or self.data[start] != 2:
            return blocks
        table = self.scratch // BLOCK * 16
        at = start + 1
        while at + 16 <= start + table:
            block, where = struct.unpack_from("<QQ", self.data, at)
            if (block, where) == (0, 0):
                break
            if where < start + table or where + BLOCK > start + self.scratch:
                fail("scratch data at %d" % where)
            blocks[block] = self.data[where:where + BLOCK]
            at += 16
        return blocks

    def order(self):
        made = self.made()
        if self.sequence:
            by_block = {op[2]: op for op in made}
            first = [by_block.pop(block) for block in self.sequence]
            return first + sorted(by_block.values(), key=lambda op: op[2])
        if self.version == 3:
            return made
        first = [op for op in made if op[0] in (COPY, XOR)]
        rest = [op for op in made if op[0] in (REPLACE, ZERO)]
        return first + sorted(rest, key=lambda op: op[2])


def padded(path, cow):
    with open(path, "rb") as file:
        base = bytearray(file.read())
    last = max([op[2] + op[3] for op in cow.made()], default=0) * BLOCK
    return base + bytes(max(0, last - len(base)))


def main():
    verb = sys.argv[1]
    if verb == "ops":
        for op in Cow(sys.argv[2]).ops:
            print(json.dumps(dict(zip(
                ("type", "compression", "new", "blocks", "source", "data", "length"),
                (NAMES[op[0]],) + op[1:]))))
        return
    cow = Cow(sys.argv[3])
    old = padded(sys.argv[2], cow)
    if verb == "build":
        new, seen = bytearray(old), set()
        ready, merged = cow.ready(), {op[2] for op in cow.order()[:cow.merged]}
        for op in cow.made():
            blocks = set(range(op[2], op[2] + op[3]))
            if blocks & seen:
                fail("two operations for block %d" % op[2])
            seen |= blocks
            if op[2] in ready:
                new[op[2] * BLOCK:(op[2] + 1) * BLOCK] = ready[op[2]]
                continue
            if op[2] in merged:
                continue
            new[op[2] * BLOCK:(op[2] + op[3]) * BLOCK] = cow.content(op, old)
        with open(sys.argv[4], "wb") as file:
            file.write(new)
    elif verb == "merge":
        for op in cow.order():
            old[op[2] * BLOCK:(op[2] + op[3]) * BLOCK] = cow.content(op, old)
        with open(sys.argv[2], "wb") as file:
            file.write(old)
    else:
        fail("verb " + verb)


main()
