from __future__ import annotations

import gzip
import json

import pytest

from equipoise.errors import TextError
from equipoise.profiling.texts import read_documents


def lines(*texts: str) -> str:
    return "\n".join(json.dumps({"text": text, "title": "t"}) for text in texts)


def test_files_are_read_in_order_of_files_and_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("one", "two\u2028still two") + "\n\n" + lines("three"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("four").encode()))
    (tmp_path / "c.txt").write_bytes("\ufefffünf\r\nlines".encode())
    (tmp_path / "d.TXT.gz").write_bytes(gzip.compress(b"six"))
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.TXT.gz")]
    assert read_documents(paths) == ["one", "two\u2028still two", "three", "four", "fünf\nlines", "six"]


def test_a_single_path_and_another_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n{"body": "  "}\n')
    assert read_documents(path, field="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t ", "every document is empty"),
        ("a.txt", b"", "every document is empty"),
        ("a.jsonl", b"", "every document is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "line 3 is a JSON list"),
        ("a.jsonl", b'{"body": "x"}', "line 1 has no field 'text'; it has: body"),
        ("a.jsonl", b'{"text": 3}', "line 1: field 'text' holds int"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8 text .byte 3."),
        ("a.txt", b"ab\0c", "binary data .a zero byte at 2"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:20], "not a whole gzip file"),
        ("a.pdf", b"x", "allowed endings are .txt"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as error:
        read_documents([tmp_path / name])
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(TextError, match="does not exist"):
        read_documents([tmp_path / "none.txt"])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(TextError, match="directory"):
        read_documents([tmp_path / "folder.txt"])
    with pytest.raises(TextError, match="no text files given"):
        read_documents([])


def test_chats_are_written_out_beside_documents(tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    rows = [{"messages": chat}, {"text": "plain", "messages": chat}, {"text": chat}]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    told = read_documents([path], write_chat=lambda messages: " | ".join(said["content"] for said in messages))
    assert told == ["hello | good day", "plain", "hello | good day"]
    with pytest.raises(TextError, match="line 1: field 'messages' holds a chat"):
        read_documents([path])


def test_a_list_that_is_no_chat_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": ["a", "b"]}))
    with pytest.raises(TextError, match=r"holds list, neither text nor a chat \(a list of objects with role and content\)"):
        read_documents([path], write_chat=lambda messages: "x")
