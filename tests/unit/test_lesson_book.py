"""What was learned of the models survives in SQLite, per definition; a broken file costs no more than that."""

from pathlib import Path

from mmd.gateway.lesson_book import LessonBook
from mmd.policy.lesson import Lesson

_LESSON = Lesson(start_s=12.5, wake_s=0.7, peak_bytes=5 << 30, raised_bytes=6 << 30, held_bytes={1: 1 << 30})


def test_lessons_survive_and_belong_to_a_definition(tmp_path: Path) -> None:
    book = LessonBook(tmp_path / "lessons.sqlite")
    book.save("a", "d1", _LESSON)
    book.save("b", "d7", Lesson())
    book.close()
    book = LessonBook(tmp_path / "lessons.sqlite")
    assert book.load({"a": "d1", "c": "d9"}) == {"a": _LESSON}
    assert book.load({"a": "d2"}) == {}, "defined anew"
    assert book.load({"a": "d1"}) == {}, "and the old one is forgotten"
    assert book.load({"b": "d7"}) == {"b": Lesson()}
    book.forget("b")
    assert book.load({"b": "d7"}) == {}
    book.close()


def test_a_broken_file_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "lessons.sqlite").write_bytes(b"this is no database " * 100)
    book = LessonBook(tmp_path / "lessons.sqlite")
    book.save("a", "d1", _LESSON)
    assert book.load({"a": "d1"}) == {}
    book = LessonBook(tmp_path / "missing" / "lessons.sqlite")
    assert book.load({"a": "d1"}) == {}
    book.close()
