from tests.docs.picture import PICTURE


def test_the_picture_of_the_console_is_a_png_of_less_than_200_kb_and_in_the_readme() -> None:
    assert PICTURE.read_bytes().startswith(b"\x89PNG\r\n")
    assert PICTURE.stat().st_size < 200_000
    assert "](docs/console.png)" in (PICTURE.parents[1] / "README.md").read_text()
