"""The WebDataset face of a store: shards as tar archives of .npy files, one for each sample. Opens nothing.

A shard object is its samples' members in order, then two blocks of zeros. A member is a ustar header, a file of NumPy's
format 1.0, and zeros up to a multiple of 512 bytes; nothing in it depends on when, where or by whom it was written. The
members of one chunk, headers and zeros included, are the chunk's payload.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np

from storage_schemas.codecs import DecodeError, kind_dtype, kind_shape
from storage_schemas.spec import StoreSpec

BLOCK_NBYTES = 512
#: Room of the header of an .npy file: enough for every shape, and values begin where kernels copy fastest.
NPY_HEADER_NBYTES = 128
#: Where the values of a member begin, with codec "none".
VALUES_OFFSET = BLOCK_NBYTES + NPY_HEADER_NBYTES
END_OF_ARCHIVE = bytes(2 * BLOCK_NBYTES)
#: Higher levels save less than 1 % of states in any precision, and level 6 takes three times as long for bfloat16.
GZIP_LEVEL = 1
_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # deflate; no name, no time, no system
_NAME_NBYTES = 100
_INDEX_DIGITS = 9
_SIZE = slice(124, 135)
_CHECKSUM = slice(148, 156)


def member_name(spec: StoreSpec, kind: str, sample: int) -> str:
    """File name of one sample in the archive, for example `000001234.patches.npy`."""
    return f"{sample:0{_INDEX_DIGITS}d}.{kind}.npy" + (".gz" if spec.codec == "gzip" else "")


def member_nbytes(spec: StoreSpec, kind: str) -> int:
    """Room of one member before the codec: header, file, zeros."""
    return BLOCK_NBYTES + _whole_blocks(_file_nbytes(spec, kind))


def most_member_nbytes(spec: StoreSpec, kind: str) -> int:
    """The most room that a member may take; deflate makes what it cannot compress a little longer."""
    return BLOCK_NBYTES + _whole_blocks(_most_stored(spec, kind))


def least_member_nbytes(spec: StoreSpec, kind: str) -> int:
    """The least room that a member may take."""
    return member_nbytes(spec, kind) if spec.codec == "none" else 2 * BLOCK_NBYTES


def encode_payload(spec: StoreSpec, kind: str, chunk: int, memory: memoryview) -> memoryview | bytes:
    """The members of one chunk.

    Args:
        spec: Of the store.
        kind: Of the array.
        chunk: Which one; it gives the members their names.
        memory: Writable, with room for each sample of a full chunk as `member_nbytes` says, and the values in their
            places. Headers and zeros are filled in here.

    Returns:
        With codec "none" the beginning of the memory.
    """
    samples = spec.chunk_samples(chunk)
    members = np.frombuffer(memory, np.uint8)[: len(samples) * member_nbytes(spec, kind)].reshape(len(samples), -1)
    file_nbytes = _file_nbytes(spec, kind)
    members[:, BLOCK_NBYTES:VALUES_OFFSET] = np.frombuffer(npy_header(spec, kind), np.uint8)
    if spec.codec == "none":
        members[:, :BLOCK_NBYTES] = tar_headers(spec, kind, samples, [file_nbytes] * len(samples))
        members[:, BLOCK_NBYTES + file_nbytes :] = 0
        return memory[: members.nbytes]
    files = [_gzip(member[BLOCK_NBYTES : BLOCK_NBYTES + file_nbytes].data) for member in members]
    headers = tar_headers(spec, kind, samples, [len(file) for file in files])
    return b"".join(
        part
        for header, file in zip(headers, files)
        for part in (header.tobytes(), file.ljust(_whole_blocks(len(file)), b"\0"))
    )


def decode_payload(
    spec: StoreSpec,
    kind: str,
    chunk: int,
    payload: bytes | bytearray | memoryview,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Undo `encode_payload`.

    Args:
        spec: Of the store that the payload comes from.
        kind: Of the array.
        chunk: Which one.
        payload: Checked against its CRC32C already.
        out: Memory to decode into, at least a raw chunk of bytes. Unused by codec "none".

    Returns:
        (sample, ..., dim) in the stored dtype, without rows past the end of the store. With codec "none" a view of the
        payload, whose rows are contiguous and do not follow one another.

    Raises:
        DecodeError: The payload is not the members of that chunk.
    """
    samples = spec.chunk_samples(chunk)
    shape, dtype = (len(samples), *kind_shape(spec, kind)), kind_dtype(spec, kind)
    if spec.codec == "none":
        _check_plain(spec, kind, samples, payload)
        stride, inner = member_nbytes(spec, kind), np.empty(shape[1:], dtype).strides
        return np.ndarray(shape, dtype, payload, VALUES_OFFSET, (stride, *inner))
    row_nbytes = _file_nbytes(spec, kind) - NPY_HEADER_NBYTES
    decoded = np.empty(len(samples) * row_nbytes, np.uint8) if out is None else out[: len(samples) * row_nbytes]
    rows = decoded.reshape(len(samples), row_nbytes)
    files = _split_members(spec, kind, samples, memoryview(payload).cast("B"))
    for sample, file, row in zip(samples, files, rows):
        row[...] = np.frombuffer(_gunzip(spec, kind, sample, file), np.uint8)[NPY_HEADER_NBYTES:]
    return decoded.view(dtype).reshape(shape)


def tar_headers(spec: StoreSpec, kind: str, samples: range, nbytes: Sequence[int]) -> np.ndarray:
    """(sample, 512) uint8: the ustar headers of some members, whose files have `nbytes` bytes."""
    headers = np.empty((len(samples), BLOCK_NBYTES), np.uint8)
    headers[:] = np.frombuffer(_header_form(member_name(spec, kind, 0)), np.uint8)
    headers[:, :_INDEX_DIGITS] = _digits(np.asarray(samples), 10, _INDEX_DIGITS)
    headers[:, _SIZE] = _digits(np.asarray(nbytes), 8, _SIZE.stop - _SIZE.start)
    headers[:, _CHECKSUM.start : _CHECKSUM.start + 6] = _digits(headers.sum(axis=1, dtype=np.int64), 8, 6)
    headers[:, _CHECKSUM.start + 6] = 0  # the checksum was taken with eight spaces in its place; one of them stays
    return headers


def npy_header(spec: StoreSpec, kind: str) -> bytes:
    """What an .npy file of one sample begins with (NumPy's format 1.0)."""
    return _npy_header(kind_dtype(spec, kind).str, kind_shape(spec, kind))


def _check_plain(spec: StoreSpec, kind: str, samples: range, payload: bytes | bytearray | memoryview) -> None:
    nbytes, file_nbytes = member_nbytes(spec, kind), _file_nbytes(spec, kind)
    if len(payload) != len(samples) * nbytes:
        raise DecodeError(
            f"{kind} members of {len(payload):,} bytes in all; {len(samples)} of {nbytes:,} bytes were expected"
        )
    members = np.frombuffer(payload, np.uint8).reshape(len(samples), nbytes)
    _check_headers(spec, kind, samples, members[:, :BLOCK_NBYTES], [file_nbytes] * len(samples))
    begins = np.frombuffer(npy_header(spec, kind), np.uint8)
    wrong = np.flatnonzero((members[:, BLOCK_NBYTES:VALUES_OFFSET] != begins).any(axis=1))
    if len(wrong):
        found = members[wrong[0], BLOCK_NBYTES:VALUES_OFFSET].tobytes()
        raise _not_this_array(spec, kind, samples[int(wrong[0])], found)
    if members[:, BLOCK_NBYTES + file_nbytes :].any():
        raise DecodeError(f"{kind} members with other bytes than zeros between them")


def _check_headers(spec: StoreSpec, kind: str, samples: range, found: np.ndarray, nbytes: Sequence[int]) -> None:
    expected = tar_headers(spec, kind, samples, nbytes)
    wrong = np.flatnonzero((found != expected).any(axis=1))
    if len(wrong):
        i = int(wrong[0])
        name, found_size = _described(found[i].tobytes())
        raise DecodeError(
            f"a tar header of {name} with {found_size} bytes; {member_name(spec, kind, samples[i])!r} with "
            f"{nbytes[i]:,}, no times, no owners and their checksum were expected"
        )


def _split_members(spec: StoreSpec, kind: str, samples: range, payload: memoryview) -> list[memoryview]:
    """The compressed files of a chunk, whose sizes only their headers know."""
    files, headers, place = [], [], 0
    for sample in samples:
        header = payload[place : place + BLOCK_NBYTES]
        nbytes, most = _declared_nbytes(header), _most_stored(spec, kind)
        if nbytes is None or not 0 < nbytes <= most:
            name, found = _described(bytes(header))
            raise DecodeError(
                f"a tar header of {name} with {found} bytes; "
                f"{member_name(spec, kind, sample)!r} with 1 to {most:,} was expected"
            )
        start = place + BLOCK_NBYTES
        place = start + _whole_blocks(nbytes)
        if place > len(payload) or bytes(payload[start + nbytes : place]).strip(b"\0"):
            raise DecodeError(f"{member_name(spec, kind, sample)!r} is cut off or not followed by zeros")
        headers.append(np.frombuffer(header, np.uint8))
        files.append(payload[start : start + nbytes])
    _check_headers(spec, kind, samples, np.stack(headers), [len(file) for file in files])
    if place != len(payload):
        raise DecodeError(f"{len(payload) - place:,} bytes behind the last {kind} member; none were expected")
    return files


def _gunzip(spec: StoreSpec, kind: str, sample: int, file: memoryview) -> bytes:
    """A decompressed .npy file, never longer than it should be."""
    name, nbytes = member_name(spec, kind, sample), _file_nbytes(spec, kind)
    if bytes(file[: len(_GZIP_HEADER)]) != _GZIP_HEADER:
        raise DecodeError(f"{name!r} does not begin as a gzip file without name and time")
    inflate = zlib.decompressobj(zlib.MAX_WBITS + 16)
    try:
        data = inflate.decompress(file, nbytes + 1)  # checks gzip's own checksum and length when it comes to the end
    except zlib.error as error:
        raise DecodeError(f"{name!r} cannot be decompressed: {error}") from error
    if not inflate.eof or inflate.unused_data or len(data) != nbytes:
        what = f"more than {nbytes:,}" if len(data) > nbytes else f"{len(data):,}"
        raise DecodeError(f"{name!r} decompresses to {what} bytes, or is not one whole stream; {nbytes:,} are expected")
    if data[:NPY_HEADER_NBYTES] != npy_header(spec, kind):
        raise _not_this_array(spec, kind, sample, data[:NPY_HEADER_NBYTES])
    return data


def _gzip(data: memoryview) -> bytes:
    deflate = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(data) + deflate.flush()
    return _GZIP_HEADER + body + struct.pack("<II", zlib.crc32(data), data.nbytes)


def _file_nbytes(spec: StoreSpec, kind: str) -> int:
    """Size of the .npy file of one sample."""
    return NPY_HEADER_NBYTES + math.prod(kind_shape(spec, kind)) * kind_dtype(spec, kind).itemsize


def _most_stored(spec: StoreSpec, kind: str) -> int:
    """Bytes that a file may have in the archive: no deflate makes it longer than by an eighth."""
    nbytes = _file_nbytes(spec, kind)
    return nbytes if spec.codec == "none" else nbytes + nbytes // 8 + 64


def _whole_blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


@cache
def _header_form(name: str) -> bytes:
    """A ustar header of a file, to be completed: size 0, and spaces for the checksum."""
    mode, owner, time = b"0000644\0", b"0000000\0", b"00000000000\0"
    fields = [name.encode().ljust(_NAME_NBYTES, b"\0"), mode, owner, owner, time, time, b" " * 8, b"0"]
    before = b"".join(fields).ljust(257, b"\0") + b"ustar\x0000"
    return before.ljust(BLOCK_NBYTES, b"\0")


@cache
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    room = NPY_HEADER_NBYTES - 10
    assert len(text) < room, text
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1).encode() + b"\n"


def _digits(values: np.ndarray, base: int, n_digits: int) -> np.ndarray:
    """(value, digit) of ASCII digits, the highest first."""
    return values[:, None] // base ** np.arange(n_digits - 1, -1, -1) % base + ord("0")


def _declared_nbytes(header: memoryview) -> int | None:
    """Size of the file behind a tar header, if it is spelled as we spell it."""
    text = bytes(header[_SIZE])
    return int(text, 8) if len(text) == 11 and set(text) <= set(b"01234567") else None


def _described(header: bytes) -> tuple[str, str]:
    """Name and size in a tar header that is not ours, for a message."""
    name = header[:_NAME_NBYTES].partition(b"\0")[0].decode("ascii", "backslashreplace")
    nbytes = _declared_nbytes(memoryview(header))
    return repr(name), f"{nbytes:,}" if nbytes is not None else "an unreadable number of"


def _not_this_array(spec: StoreSpec, kind: str, sample: int, found: bytes) -> DecodeError:
    return DecodeError(
        f"{member_name(spec, kind, sample)!r} begins with {_text(found)!r}; "
        f"an .npy file with {_text(npy_header(spec, kind))!r} was expected"
    )


def _text(npy: bytes) -> str:
    """What an .npy header says, for a message."""
    return npy[10:].decode("ascii", "backslashreplace").strip()
