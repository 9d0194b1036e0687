"""Write pickles like those of Python 2 and numpy in 2009, opcode by opcode, as in CIFAR's archives."""

import struct

import numpy as np

NONE_AND_MARKS = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def old_pickle(value):
    """Return a pickle of protocol 2, with byte strings for text."""
    return b"\x80\x02" + _value(value) + b"."


def _value(value):
    if isinstance(value, dict):
        return b"}(" + b"".join(_value(k) + _value(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_value, value)) + b"e"
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data
    if isinstance(value, np.ndarray):
        return _array(value)
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)


def _array(array):
    kind = array.dtype.str[1:].encode()
    dtype = b"cnumpy\ndtype\nU" + bytes([len(kind)]) + kind + b"K\x00K\x01\x87R(K\x03U\x01|" + NONE_AND_MARKS
    shape = b"".join(map(_value, array.shape)) + (b"\x86" if array.ndim == 2 else b"\x85")
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return start + b"(K\x01" + shape + dtype + b"\x89" + _value(array.tobytes()) + b"tb"
