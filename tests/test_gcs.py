"""The emulator of Google Cloud Storage gives back what it was given."""

import pytest

from gemma4_tpu.storage import filesystem


@pytest.mark.parametrize(
    "data", [b"", b"\r", b"text\r", b"text\n", b"text\r\n", b"\n\ntext", b"key: value\n\ntext", bytes(range(256))]
)
def test_bytes_come_back(bucket, data):
    fs, root = filesystem(bucket)
    fs.pipe_file(f"{root}/file", data)
    assert fs.cat_file(f"{root}/file") == data


def test_the_emulator_still_loses_a_carriage_return():
    """When this fails, `_read_data` of tests/gcs.py can go."""
    from email.parser import BytesParser

    from gcp_storage_emulator import server

    assert server.BytesParser is BytesParser
    body = b'Content-Type: multipart/related; boundary="="\r\n--=\n\n{}\n--=\n\ntext\r\n--=--'
    assert BytesParser().parsebytes(body).get_payload()[1].get_payload(decode=True) == b"text"
