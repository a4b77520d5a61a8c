"""Nothing that is read is executed: no pickles, no shells, and weights loaded as weights only. Of the source itself."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "vdbench").rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
# what runs code that it is given; `compile` and `eval` are also the names of methods, and of a verb
RUNNERS = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.unsafe_load",
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call, dict[str, ast.expr]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node, {word.arg: word.value for word in node.keywords if word.arg}


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not UNPICKLERS & {name.partition(".")[0] for name in names}, f"line {node.lineno}"
    for name, call, words in calls(tree):
        where = f"line {call.lineno}: {name}"
        assert name not in RUNNERS, where
        if name in ("torch.load", "torch.jit.load", "torch.hub.load"):
            assert name == "torch.load" and is_constant(words.get("weights_only"), True), where
        if name in ("np.load", "numpy.load"):
            assert is_constant(words.get("allow_pickle"), False), where
        if name in ("pd.read_pickle", "pandas.read_pickle", "tarfile.extract", "tarfile.extractall"):
            raise AssertionError(where)
        if name.endswith((".extractall", ".extract")):
            raise AssertionError(where)
        if name.startswith("subprocess."):
            assert "shell" not in words, where
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr), f"{where}: a list of words, not a text"
        if name == "yaml.load":
            assert ast.unparse(call.args[1]) == "UniqueKeys", where
        if name.endswith("Image.open"):
            assert "formats" in words, where


def test_the_loader_of_suites_is_a_safe_one():
    import yaml

    from vdbench.unique_keys import UniqueKeys

    assert issubclass(UniqueKeys, yaml.SafeLoader)


def test_every_word_that_a_rule_gives_to_a_shell_is_quoted():
    """Folder names with spaces and quotes are words too."""
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        text = path.read_text(encoding="utf-8")
        for command in re.findall(r"\n    shell:\n((?:        .*\n)+)", text):
            for field in re.findall(r"\{([^{}]+)\}", command):
                assert field.endswith(":q"), f"{path.name}: {{{field}}}"


def test_downloads_are_verified_before_they_are_opened():
    """Whatever comes from a server passes through one function, which gives back verified bytes."""
    opening = [path for path in SOURCES if re.search(r"urlopen|urlretrieve|requests\.|httpx", path.read_text())]
    assert [path.name for path in opening] == ["files.py"]
    tree = ast.parse(opening[0].read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    downloading = [f for f in functions if any(name == "urllib.request.urlopen" for name, _, _ in calls(f))]
    assert [function.name for function in downloading] == ["_download_from"]
    returned = [
        ast.unparse(node.value) for node in ast.walk(downloading[0]) if isinstance(node, ast.Return) and node.value
    ]
    assert returned and all(value.startswith("file.verified(") for value in returned)
