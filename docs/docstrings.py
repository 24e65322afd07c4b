"""Bring the reStructuredText and numpydoc of docstrings into the form that mkdocstrings takes, for griffe."""

import re

import griffe


class Markdown(griffe.Extension):
    """Footnotes without their markup, literal blocks without their colons, choices that do not pass for a default."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(
                r"^( *)\.\. \[(\d+)\] ",
                r"\1\\[\2] ",
                obj.docstring.value,
                flags=re.MULTILINE,
            )
            text = re.sub(r"\[(\d+)\]_", r"\\[\1]", text)
            text = re.sub(r"^( *)::\n", "", text, flags=re.MULTILINE)
            text = re.sub(r"::\n\n", ":\n\n", text)
            choices = re.compile(r"^( *\w+ : )\{(.+?)\}", re.MULTILINE)
            obj.docstring.value = choices.sub(
                lambda m: m[1] + m[2].replace(", ", " | "), text
            )
