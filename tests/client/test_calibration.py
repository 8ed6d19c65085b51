"""What strategies are measured on, from memory and from a folder."""

from pathlib import Path

import pytest

from vflow_client import LiveTraffic, Sample, load_samples
from vflow_client.calibration import to_calibration

GOOD = '{"image": "a.png", "question": "What is it?", "answer": "a star"}'


def folder(path: Path, *lines: str) -> Path:
    for name in ("a.png", "b.png"):
        (path / name).write_bytes(name.encode())
    (path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


def test_samples_and_live_traffic(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"from a path")
    sent = to_calibration([Sample(picture, ["What?", "Where?"]), Sample(b"bytes", ("How many?",))]).samples.samples
    assert [sample.image.data for sample in sent] == [b"from a path", b"bytes"]
    assert [list(sample.questions) for sample in sent] == [["What?", "Where?"], ["How many?"]]
    assert to_calibration(LiveTraffic(max_samples=5)).live.max_samples == 5
    assert to_calibration(LiveTraffic()).WhichOneof("source") == "live"


def test_one_text_is_not_a_sequence_of_questions() -> None:
    with pytest.raises(TypeError, match=r"write \['What\?'\]"):
        Sample(b"picture", "What?")


def test_a_folder_is_read_conversation_by_conversation(tmp_path: Path) -> None:
    data = folder(
        tmp_path,
        '{"image": "b.png", "question": "How many?"}',
        "",
        GOOD,
        '{"image": "b.png", "question": "Und wo, schön?", "group": "place"}',
    )
    assert load_samples(data) == [
        Sample(tmp_path / "b.png", ("How many?", "Und wo, schön?")),
        Sample(tmp_path / "a.png", ("What is it?",)),
    ]
    assert load_samples(str(data), pictures=1, questions=1) == [Sample(tmp_path / "b.png", ("How many?",))]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ('["a.png", "What?"]', "expected an object"),
        ('{"question": "What?"}', "expected a text as 'image', got None"),
        ('{"image": "a.png", "question": 3}', "expected a text as 'question', got 3"),
        ('{"image": "a.png", "question": " "}', "expected a text as 'question', got ' '"),
        ('{"image": "c.png", "question": "What?"}', "no picture 'c.png' in the folder"),
    ],
    ids=["broken", "list", "no image", "number", "blank", "missing picture"],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 3: ") as caught:
        load_samples(folder(tmp_path, GOOD, "", line))
    assert fault in str(caught.value)


def test_a_folder_without_questions(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_samples(tmp_path)
    with pytest.raises(ValueError, match=r"no questions; expected lines such as \{\"image\""):
        load_samples(folder(tmp_path, ""))
    (tmp_path / "questions.jsonl").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(ValueError, match="UTF-8"):
        load_samples(tmp_path)
