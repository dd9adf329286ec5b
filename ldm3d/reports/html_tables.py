"""JSON objects as HTML tables, so that a report shows any file of results without knowing what made it."""

from __future__ import annotations

from typing import Any

from .pages import escape

LONG = 12  # rows; longer tables are folded
SCORES = ("metrics", "figures", "scores", "spaces")  # keys of a report that hold its scores
PLAIN = {  # keys of reports -> words for a reader
    "metrics": "scores",
    "figures": "generated beside real cases",
    "spaces": "nearest training cases",
    "low": "95 % from",
    "high": "95 % to",
    "std": "standard deviation",
    "real_halves": "real cases among themselves",
    "equal_size": "as many generated cases",
    "through_autoencoder": "through the autoencoder",
    "rank_z": "rank z",
    "generated_median": "samples, median",
    "reference_median": "real cases, median",
    "reference_min": "real cases, least",
}


def plain(key: str) -> str:
    """The words for a key of a report: those of PLAIN, else the key with spaces."""
    return PLAIN.get(key, key.replace("_", " "))


def as_text(value: Any) -> str:
    """A JSON value as the text of a cell. Floats get four digits, null is a dash."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(f"[{as_text(v)}]" if isinstance(v, list) else as_text(v) for v in value)
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(value: Any, tag: str = "td") -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"<{tag}{' class=number' if number else ''}>{escape(as_text(value))}</{tag}>"


def wide_table(rows: dict[str, dict[str, Any]], corner: str = "") -> str:
    """A table with one line per row and one column per key. corner: text of the first cell."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    is_number = {n: any(isinstance(row.get(n), (int, float)) for row in rows.values()) for n in names}
    head = "".join(f"<th{' class=number' if is_number[n] else ''}>{escape(plain(n))}</th>" for n in names)
    lines = [
        f"<tr>{_cell(plain(title), 'th')}{''.join(_cell(row.get(n, '')) for n in names)}</tr>"
        for title, row in rows.items()
    ]
    head = f"<tr><th>{escape(plain(corner))}</th>{head}</tr>"
    return f"<div class=wide><table>{head}{''.join(lines)}</table></div>"


def key_table(values: dict[str, Any]) -> str:
    """A table of two columns: key, value."""
    lines = [f"<tr><th>{escape(k)}</th><td>{escape(as_text(v))}</td></tr>" for k, v in values.items()]
    return f"<table>{''.join(lines)}</table>"


def folded(title: str, body: str) -> str:
    """HTML that opens at a click on its title."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def tables_of(content: dict[str, Any], title: str = "") -> tuple[str, dict[str, Any]]:
    """A JSON object as tables: (HTML of all nested objects, the values that are not objects).

    An object of flat objects, such as {"psnr": {"mean": 25.0, "low": 24.5}, "ssim": {...}}, becomes one table
    with a line for each. A table of more than LONG lines is folded.
    """
    plain = {k: v for k, v in content.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in content.items() if isinstance(v, dict) and v}
    if not plain and nested and all(not isinstance(v, dict) for row in nested.values() for v in row.values()):
        body = wide_table(nested, title)
        return (folded(f"{title}: {len(nested)}", body) if len(nested) > LONG else body), {}
    parts = []
    for name, value in nested.items():
        body, rest = tables_of(value, name)
        parts.append(body)
        parts += [f"<h4>{escape(name)}</h4>{key_table(rest)}"] if rest else []
    return "".join(parts), plain


def scores_of(report: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(HTML of what a report found, the rest of the report): its verdict, its warnings, then its scores.

    Rows without a single number are named in one line below their table.
    """
    rest, body = dict(report), ""
    if rest.get("verdict"):
        body += f"<p class=verdict>{escape(rest.pop('verdict'))}</p>"
    for words in rest.pop("warnings", None) or ():
        body += f'<p class="warning">{escape(words)}</p>'
    for key in SCORES:
        rows = rest.get(key)
        if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
            continue
        simple = {
            name: {k: v for k, v in row.items() if not isinstance(v, (dict, list))}
            for name, row in rows.items()
        }
        full = {
            n: row for n, row in simple.items() if any(v is not None for k, v in row.items() if k != "cases")
        }
        body += wide_table(full, key) if full else ""
        if left := [plain(name) for name in rows if name not in full]:
            body += f"<p class=faint>No value: {escape(', '.join(left))}</p>"
        if simple == rows:
            del rest[key]
    return body, rest
