"""The site: ``make docs`` makes it of the pages beside this file, of docstrings and of the commands' help.

Nothing is fetched. Names of torch and others are linked by a list of places (``ELSEWHERE``), which becomes
inventories for intersphinx in the build folder: a build without the internet is the same as one with it.
"""

import ast
import contextlib
import io
import json
import os
import re
import zlib
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments.lexers.special import TextLexer

import fedtorch
from fedtorch.__main__ import COMMANDS, main

HERE = Path(__file__).parent

project = "fedtorch"
author = "the fedtorch authors"
release = version = fedtorch.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"fedtorch {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page that is a part of another begins below its title
copybutton_prompt_text = "$ "
default_role = "literal"  # a word in single backticks of a docstring
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

ABC = ("Callable", "Collection", "Hashable", "Iterable", "Iterator", "Mapping", "Sequence")
ELSEWHERE = {
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            "torch.Tensor": "tensors.html",
            "torch.Generator": "generated/torch.Generator.html",
            "torch.device": "tensor_attributes.html",
            "torch.dtype": "tensor_attributes.html",
            "torch.nn.Module": "generated/torch.nn.Module.html",
            "torch.nn.modules.module.Module": "generated/torch.nn.Module.html",
            "torch.optim.optimizer.Optimizer": "optim.html",
            "torch.optim.lr_scheduler.LRScheduler": "optim.html",
            "torch.utils.data.dataset.Dataset": "data.html",
            "torch.utils.data.sampler.Sampler": "data.html",
        },
    ),
    "python": (
        "https://docs.python.org/3/",
        {
            **{f"collections.abc.{n}": "library/collections.abc.html" for n in ABC},
            "pathlib.Path": "library/pathlib.html",
            "abc.ABC": "library/abc.html",
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        {"numpy.ndarray": "reference/generated/numpy.ndarray.html"},
    ),
}
"""Where the documentation of names of others is: of those that our signatures have."""


def inventory(name: str, places: dict[str, str]) -> str:
    """The same as a file that intersphinx reads, in the build folder."""
    lines = [f"{n} py:class 1 {page}{'' if '#' in page else '#$'} -" for n, page in places.items()]
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: 1\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    path = HERE.parent / "build" / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress("\n".join([*lines, ""]).encode()))
    return str(path)


intersphinx_mapping = {n: (at, inventory(n, of)) for n, (at, of) in ELSEWHERE.items()}
nitpick_ignore_regex = [
    ("py:class", r"fedtorch\..*|Data|Run|Shared|nvflare\..*|flwr\..*|torch._C.Generator|torch.Size")
]
"""Types in signatures whose pages would say no more than their name, or that have none."""

PAGES = {
    "../README.md": "index.md",
    "../CHANGELOG.md": "changelog.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../benchmarks/RESULTS.md": "results.md",
}
"""Files outside of this folder that are pages of the site, too."""


NOTEBOOKS = {"notebook-hospitals": "four_hospitals", "notebook-private": "private_cnn"}
"""Pages that show a notebook of ``examples/notebooks``."""


def shown(notebook: Path) -> Iterator[str]:
    """The text and code of a notebook behind its title, and what the code showed when it was kept."""
    for k, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\A# .*\n", "", text)
            for page, name in NOTEBOOKS.items():
                text = text.replace(f"`{name}.ipynb`", f"[{name}.ipynb]({page}.md)")
            yield text
            continue
        yield f"```python\n{text}\n```"
        for n, out in enumerate(cell["outputs"]):
            data = out.get("data", {"text/plain": out.get("text", "")})
            if "image/png" in data:
                picture = HERE.parent / "build" / "notebooks" / f"{notebook.stem}-{k}-{n}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(b64decode(data["image/png"]))
                yield f"![What the code above draws](../build/notebooks/{picture.name})"
            else:
                lines = "".join(data["text/plain"]).rstrip().split("\n")
                last = "\n".join(line.rpartition("\r")[2].rstrip() for line in lines)
                yield f"```{{code-block}} text\n:class: output\n\n{last}\n```"


def relink(app: object, name: str, source: list[str]) -> None:
    """Links that are right among the files lead to pages on the site; some pages are made here."""
    if name in NOTEBOOKS:
        path = HERE.parent / "examples" / "notebooks" / f"{NOTEBOOKS[name]}.ipynb"
        source[0] += "\n" + "\n\n".join(shown(path))
    if name == "cli":
        source[0] += "".join(f"\n## fedtorch {c}\n\n```{{help}} {c}\n```\n" for c in COMMANDS)
    for file, page in PAGES.items():
        source[0] = re.sub(rf"\]\({re.escape(file)}(?=[)#])", f"]({page}", source[0])


def plain(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Docstrings are prose, with formulas in plain characters: |x|, w_k, a * b are no markup in them."""
    example = False
    for k, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(``?[^`]+``?)", line)
            parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
            lines[k] = "".join(parts)


class Help(Directive):
    """What a command says of itself: ``{help} train``; of all commands without one."""

    optional_arguments = 9

    def run(self) -> list[nodes.Node]:
        """The command's ``--help``, as it is printed."""
        out = io.StringIO()
        os.environ["COLUMNS"] = "88"
        with contextlib.redirect_stdout(out):
            long = {"train", "serve", "site"} & {*self.arguments}  # all of them fits no screen
            main([*self.arguments, "--help", *(["all"] if long else [])])
        return [nodes.literal_block(out.getvalue(), out.getvalue(), language="text")]


def told(node: ast.expr) -> str:
    """The text of a message as it stands in the code, with ... for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(told(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return told(left) + told(right)
    return "..."


class Refusals(Directive):
    """Every message of a ``ConfigError`` in the package, by file."""

    def run(self) -> list[nodes.Node]:
        """A heading in bold and a list for each file that refuses something."""
        top = Path(fedtorch.__file__).parent
        found: list[nodes.Node] = []
        for path in sorted(top.rglob("*.py")):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            raised = [c for c in calls if getattr(c.func, "id", "") == "ConfigError" and c.args]
            texts = [t for c in raised if re.search(r"\w{3}", t := told(c.args[0]))]
            if texts:
                found.append(nodes.rubric("", str(path.relative_to(top.parent))))
                items = [nodes.list_item("", nodes.paragraph("", t)) for t in dict.fromkeys(texts)]
                found.append(nodes.bullet_list("", *items))
        return found


def setup(app) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", relink)
    app.connect("autodoc-process-docstring", plain)
    app.add_lexer("csv", TextLexer)
    app.add_directive("help", Help)
    app.add_directive("refusals", Refusals)
    return {"parallel_read_safe": True}
