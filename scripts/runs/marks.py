"""Tables that a script puts into a file."""

from openclip_ext.errors import UserError
from openclip_ext.files import atomic


def put_between_marks(text: str, path: str, marks: tuple[str, str]) -> None:
    """Replace what stands between the marks of a file. Raises UserError: no such file, or no such marks."""
    try:
        with open(path) as file:
            before, start, rest = file.read().partition(marks[0])
        _, end, after = rest.partition(marks[1])
    except OSError as error:
        raise UserError(f"--table {path}: {error.strerror}") from error
    if not (start and end):
        raise UserError(f"--table {path}: must hold the lines {marks[0]} and {marks[1]}, between which tables go")
    with atomic(path) as partial, open(partial, "w") as file:
        file.write(f"{before}{start}\n{text}\n{end}{after}")
