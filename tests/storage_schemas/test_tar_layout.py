"""Tar archives as bytes: what Python's own tarfile and NumPy make of them, and what is refused in decoding."""

import io
import math
import struct
import tarfile
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas import layout, tar_layout
from storage_schemas.codecs import DecodeError, kind_dtype, kind_shape
from storage_schemas.keys import array_kind, array_path, sharded_array_paths
from storage_schemas.spec import StoreSpec
from tests.stores import make_spec
from tests.strategies import specs

PLAIN, GZIP = make_spec(backend="webdataset"), make_spec(backend="webdataset", codec="gzip")
tars = specs(backend="webdataset")
NPY = slice(512, 640)  # of a member: header and zeros of the .npy file
SLOT = tar_layout.member_nbytes(PLAIN, "cls")


def some_values(spec: StoreSpec, kind: str, n_rows: int) -> np.ndarray:
    shape, dtype = (n_rows, *kind_shape(spec, kind)), kind_dtype(spec, kind)
    values = np.arange(math.prod(shape)).reshape(shape) % 251 - 100
    return values.astype(dtype)


def encoded(spec: StoreSpec, kind: str, chunk: int, fill: int = 0xAA) -> bytes:
    """A chunk of `some_values`, in memory that held something else before."""
    memory = np.full(spec.chunks_per_shard * layout.full_chunk_nbytes(spec, kind), fill, np.uint8)
    place = chunk % spec.chunks_per_shard
    view = layout.chunks_view(spec, kind, memory)
    view[place] = some_values(spec, kind, spec.samples_per_chunk)
    stride = layout.full_chunk_nbytes(spec, kind)
    return bytes(layout.encode_payload(spec, kind, chunk, memory.data[place * stride : (place + 1) * stride]))


def kinds_of(spec: StoreSpec) -> list[str]:
    return sorted({array_kind(path) for path in sharded_array_paths(spec)})


@given(tars, st.data())
def test_chunks_come_back_and_others_read_the_same(spec, data):
    kind = data.draw(st.sampled_from(kinds_of(spec)))
    chunk = data.draw(st.integers(0, spec.n_chunks - 1))
    payload, samples = encoded(spec, kind, chunk), spec.chunk_samples(chunk)
    expected = some_values(spec, kind, len(samples))
    assert payload == encoded(spec, kind, chunk, fill=0x55), "what the memory held before shows"

    out = np.empty(layout.raw_chunk_nbytes(spec, kind), np.uint8)
    for found in (
        layout.decode_payload(spec, kind, chunk, payload),
        layout.decode_payload(spec, kind, chunk, memoryview(bytearray(payload)), out),
    ):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    least, most = layout.payload_bounds(spec, kind, len(samples))
    assert least <= len(payload) <= most
    if spec.codec == "none":
        assert len(payload) == layout.payload_nbytes(spec, kind, len(samples))

    with tarfile.open(fileobj=io.BytesIO(payload + layout.tail_bytes(spec, np.empty((0, 3), np.int64)))) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    assert [m.name for m, _ in members] == [tar_layout.member_name(spec, kind, i) for i in samples]
    for (member, file), values in zip(members, expected):
        assert member.tobuf(tarfile.USTAR_FORMAT) == payload[member.offset : member.offset + 512]
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        if spec.codec == "gzip":
            assert file[3:9] == bytes(6), "no flags, no time"
            file = zlib.decompress(file, zlib.MAX_WBITS + 16)
        assert file[:8] == b"\x93NUMPY\x01\x00"
        np.testing.assert_array_equal(np.load(io.BytesIO(file), allow_pickle=False), values)


@given(tars)
def test_headers_are_those_of_any_index_and_size(spec):
    """Up to the largest index that names have room for, and the largest size that a chunk may have."""
    starts = (0, 9, 999_999_995)
    for start in starts:
        samples, sizes = range(start, start + 5), [0, 7, 8, 511, 2**31]
        for header, sample, nbytes in zip(tar_layout.tar_headers(spec, "patches", samples, sizes), samples, sizes):
            info = tarfile.TarInfo(tar_layout.member_name(spec, "patches", sample))
            info.size = nbytes
            assert header.tobytes() == info.tobuf(tarfile.USTAR_FORMAT)


@given(tars)
def test_objects_have_the_size_that_is_said(spec):
    for path in sharded_array_paths(spec):
        kind = array_kind(path)
        for shard in range(spec.n_shards):
            chunks = spec.shard_chunks(shard)
            nbytes = sum(layout.payload_nbytes(spec, kind, len(spec.chunk_samples(chunk))) for chunk in chunks)
            assert layout.object_nbytes(spec, path, shard) == nbytes + 1024
            if spec.codec == "none":
                assert nbytes == sum(len(encoded(spec, kind, chunk)) for chunk in chunks)


def test_sizes_at_vit_b_14():
    """Header, .npy header and rounding are 0.3 % of a sample's patches in float16, a third of its CLS token."""
    spec = make_spec(backend="webdataset", dim=768, n_registers=4, grid=(16, 16))
    assert tar_layout.member_nbytes(spec, "patches") == 394_240 < 1.003 * 256 * 768 * 2
    assert tar_layout.member_nbytes(spec, "cls") == 4_096 < 1.34 * 768 * 4


def test_equal_input_gives_equal_bytes_in_any_thread():
    expected, found = encoded(GZIP, "patches", 0), []
    threads = [threading.Thread(target=lambda: found.append(encoded(GZIP, "patches", 0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def changed(payload: bytes, place: slice, data: bytes) -> bytes:
    assert place.stop - place.start == len(data)
    return payload[: place.start] + data + payload[place.stop :]


def resealed(payload: bytes, place: slice, data: bytes, member: int = 0, slot: int = SLOT) -> bytes:
    """One field of a member's tar header set, and its checksum made right again."""
    start = member * slot
    payload = changed(payload, slice(start + place.start, start + place.stop), data)
    header = changed(payload[start : start + 512], slice(148, 156), b" " * 8)
    return changed(payload, slice(start + 148, start + 156), b"%06o\0 " % sum(header))


NAME, SIZE, MODE, TIME, TYPE = slice(0, 100), slice(124, 136), slice(100, 108), slice(136, 148), slice(156, 157)


def named(name: str) -> bytes:
    return name.encode().ljust(100, b"\0")


def npy(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


TAMPERED = {
    "another sample": (
        lambda p: resealed(p, NAME, named("000000007.cls.npy")),
        r"'000000007.cls.npy' with 160 .*'000000004.cls.npy' with 160",
    ),
    "out of the archive": (lambda p: resealed(p, NAME, named("../../x.cls.npy")), r"'\.\./\.\./x\.cls\.npy'"),
    "absolute": (lambda p: resealed(p, NAME, named("/etc/passwd")), "'/etc/passwd'"),
    "another kind": (lambda p: resealed(p, NAME, named("000000004.registers.npy")), "'000000004.registers.npy'"),
    "not ASCII": (lambda p: resealed(p, NAME, b"\xff\x1b[2J".ljust(100, b"\0")), r"'\\\\xff\\x1b"),
    "swapped": (lambda p: p[SLOT : 2 * SLOT] + p[:SLOT] + p[2 * SLOT :], "'000000005.cls.npy' .*'000000004.cls.npy'"),
    "twice": (lambda p: p[:SLOT] + p[:SLOT] + p[2 * SLOT :], "'000000004.cls.npy' .*'000000005.cls.npy'"),
    "ten gigabytes": (lambda p: resealed(p, SIZE, b"112402762000 "[:12]), "with an unreadable number of bytes|with"),
    "size in base 256": (lambda p: resealed(p, SIZE, b"\x80" + bytes(11)), "an unreadable number of bytes"),
    "no digits": (lambda p: resealed(p, SIZE, b"0x0000000a0\0"), "an unreadable number of bytes"),
    "negative": (lambda p: resealed(p, SIZE, b"-0000000240\0"), "an unreadable number of bytes"),
    "mode": (lambda p: resealed(p, MODE, b"0004755\0"), "no times, no owners"),
    "time": (lambda p: resealed(p, TIME, b"00000000001\0"), "no times, no owners"),
    "a link": (lambda p: resealed(p, TYPE, b"2"), "no times, no owners"),
    "checksum": (lambda p: changed(p, slice(148, 154), b"000000"), "their checksum"),
    "last member": (
        lambda p: resealed(p, NAME, named("000000008.cls.npy"), member=3),
        "'000000008.cls.npy'.*'000000007",
    ),
    "cut off": (lambda p: p[:-512], "3,584 bytes in all; 4 of 1,024 bytes"),
    "one too many": (lambda p: p + p[:SLOT], "5,120 bytes in all; 4 of 1,024 bytes"),
    "empty": (lambda p: b"", "members of 0 bytes in all"),
    "bytes between members": (lambda p: changed(p, slice(SLOT - 1, SLOT), b"x"), "other bytes than zeros"),
    "another type": (
        lambda p: changed(p, NPY, npy("{'descr': '<f8', 'fortran_order': False, 'shape': (8,), }")),
        r"begins with .*<f8.*; .*<f4.* was expected",
    ),
    "objects": (lambda p: changed(p, NPY, npy("{'descr': '|O', 'fortran_order': False, 'shape': (8,), }")), r"\|O"),
    "another order": (
        lambda p: changed(p, NPY, npy("{'descr': '<f4', 'fortran_order': True, 'shape': (8,), }")),
        "True",
    ),
    "another shape": (
        lambda p: changed(p, NPY, npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }")),
        r"\(2, 4\)",
    ),
    "another version": (lambda p: changed(p, slice(518, 519), b"\x02"), "an .npy file with"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_other_members_are_refused_and_named(what):
    tamper, message = TAMPERED[what]
    sound = encoded(PLAIN, "cls", 1)
    layout.decode_payload(PLAIN, "cls", 1, sound)
    with pytest.raises(DecodeError, match=message) as caught:
        layout.decode_payload(PLAIN, "cls", 1, tamper(sound))
    assert str(caught.value).isprintable()


def one_gzip_member(file: bytes, declared: int | None = None) -> bytes:
    """A chunk of one CLS token with this file in its archive."""
    spec = make_spec(backend="webdataset", codec="gzip", n_samples=1)
    header = tar_layout.tar_headers(spec, "cls", range(1), [len(file) if declared is None else declared])[0]
    return header.tobytes() + file.ljust(-(-len(file) // 512) * 512, b"\0")


def gzipped(data: bytes, header: bytes = b"\x1f\x8b\x08\0\0\0\0\0\0\xff") -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    return header + body + struct.pack("<II", zlib.crc32(data), len(data) % 2**32)


FILE = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (8,), }") + np.arange(8, dtype="<f4").tobytes()
TIMED = b"\x1f\x8b\x08\0\1\0\0\0\0\xff"
TAMPERED_GZIP = {
    "a bomb": (lambda: one_gzip_member(gzipped(FILE + bytes(20_000))), "decompresses to more than 160 bytes"),
    "short": (lambda: one_gzip_member(gzipped(FILE[:-1])), "decompresses to 159 bytes"),
    "two streams": (lambda: one_gzip_member(gzipped(FILE) + gzipped(FILE)), "not one whole stream"),
    "zeros behind": (lambda: one_gzip_member(gzipped(FILE) + b"\0"), "not one whole stream"),
    "cut off": (lambda: one_gzip_member(gzipped(FILE)[:-1]), "not one whole stream"),
    "not gzip": (lambda: one_gzip_member(FILE), "does not begin as a gzip file"),
    "a time": (lambda: one_gzip_member(gzipped(FILE, TIMED)), "does not begin as a gzip file"),
    "checksum": (lambda: one_gzip_member(gzipped(FILE)[:-8] + b"sum." + gzipped(FILE)[-4:]), ": .*data check"),
    "nonsense": (lambda: one_gzip_member(gzipped(FILE)[:10] + b"\xff" * 40), "cannot be decompressed"),
    "another type": (lambda: one_gzip_member(gzipped(FILE.replace(b"f4", b"i4"))), "begins with .*i4"),
    "size 0": (lambda: one_gzip_member(b""), "with 0 bytes; '000000000.cls.npy.gz' with 1 to 244 was expected"),
    "ten gigabytes": (lambda: one_gzip_member(gzipped(FILE), 8**11 - 1), "with 8,589,934,591 bytes; .* with 1 to 244"),
    "larger than the chunk": (lambda: one_gzip_member(gzipped(FILE), 244)[:512], "is cut off"),
    "no header": (lambda: b"", "with an unreadable number of bytes"),
    "half a header": (lambda: one_gzip_member(gzipped(FILE))[:200], "."),
    "bytes behind the file": (lambda: one_gzip_member(gzipped(FILE))[:-1] + b"x", "not followed by zeros"),
    "bytes behind the last": (lambda: one_gzip_member(gzipped(FILE)) + bytes(512), "512 bytes behind the last cls"),
    "name": (lambda: b"1" + one_gzip_member(gzipped(FILE))[1:], "'100000000.cls.npy.gz'"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED_GZIP)
def test_other_compressed_members_are_refused_and_named(what):
    tamper, message = TAMPERED_GZIP[what]
    spec = make_spec(backend="webdataset", codec="gzip", n_samples=1)
    sound = layout.decode_payload(spec, "cls", 0, one_gzip_member(gzipped(FILE)))
    np.testing.assert_array_equal(sound, [np.arange(8)])
    with pytest.raises(DecodeError, match=message) as caught:
        layout.decode_payload(spec, "cls", 0, tamper())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("spec", [PLAIN, GZIP], ids=["none", "gzip"])
def test_no_changed_byte_goes_unseen(spec):
    """Also without the commit's checksum, each byte but those of plain values is held against what it must be."""
    payload = bytearray(encoded(spec, "cls", 0))
    expected = some_values(spec, "cls", 4)
    for place in range(len(payload)):
        payload[place] ^= 1 << place % 8
        try:
            found = layout.decode_payload(spec, "cls", 0, payload)
        except DecodeError:
            pass
        else:
            if spec.codec == "none":
                assert 640 <= place % SLOT < 640 + 32, f"byte {place} of {len(payload)}"
            else:
                np.testing.assert_array_equal(found, expected, err_msg=f"byte {place}")
        payload[place] ^= 1 << place % 8


@given(st.binary(max_size=3000), st.booleans(), st.sampled_from(["cls", "patches"]))
def test_any_bytes_give_values_or_a_message(payload, compressed, kind):
    with pytest.raises(DecodeError):
        layout.decode_payload(GZIP if compressed else PLAIN, kind, 0, payload)


def test_paths_lead_to_kinds():
    assert {array_kind(array_path(7, kind)) for kind in PLAIN.array_kinds} <= set(kinds_of(PLAIN))
