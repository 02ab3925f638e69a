"""The pages below docs/: configurations are parsed, commands run, and no error is left out."""

import ast
from contextlib import closing
import json
import os
from pathlib import Path
import re
import shlex
import shutil

import pytest
import ZConfig
from ZODB.blob import Blob
from ZODB.config import databaseFromString

from zodb_s3blobs import interfaces
from zodb_s3blobs import s3errors
from zodb_s3blobs.operate.configuration import find_database
from zodb_s3blobs.operate.main import _parser
from zodb_s3blobs.operate.main import main

from .services.location import boto3_client
from .services.location import keys
from .services.pages import blocks
from .services.pages import DOCS
from .services.pages import example
from .storages import random_bytes
from .storages import read
from .test_logwords import END_OF_WORDS
from .test_logwords import SOURCE


PAGES = sorted(DOCS.glob("*.rst"))
# Its own tests run what it shows.
OTHERS = {"backup.rst"}
SECTION = "</filestorage>\n    <blobdir-source>"


def text_of(name):
    """Return a page as one line, as far as spaces go."""
    return " ".join((DOCS / name).read_text().split())


def commands(path):
    """Return the arguments of the program in each command that a page shows."""
    lines = "\n".join(blocks(path)).splitlines()
    shown = [line.removeprefix("$ zodb-s3blobs ") for line in lines if line.startswith("$ zodb-s3")]
    return [re.sub(" +#.*", "", line) for line in shown]


def is_configuration(block):
    """Tell whether a block is a configuration, or a part of one."""
    return not block.startswith(("$ ", "[")) and "=…" not in block and "ACCESS=" not in block


CONFIGURATIONS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in PAGES
    if path.name not in OTHERS
    for number, block in enumerate(blocks(path))
    if is_configuration(block)
]


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """Return a function that puts directories of the test into a configuration."""
    for name in ("S3_ACCESS_KEY", "S3_SECRET_KEY", "OLD_ACCESS_KEY", "OLD_SECRET_KEY"):
        monkeypatch.setenv(name, "from-the-environment")
    monkeypatch.setenv("DB_PASSWORD", "secret")
    bundle = tmp_path / "certificates.crt"
    bundle.write_text("")
    (tmp_path / "lib" / "blobstorage").mkdir(parents=True)

    def place(text):
        return (
            text.replace("/var/lib/my-site", str(tmp_path / "lib"))
            .replace("/var/cache/my-site", str(tmp_path / "cache"))
            .replace("/etc/ssl/certs/ca-certificates.crt", str(bundle))
        )

    return place


def completed(block):
    """Return a part of a section as a whole configuration."""
    whole = example("plone.rst", SECTION)
    if block.startswith("<"):
        begin, end = whole.index("    <blobdir-source>"), whole.index("  </s3blobstorage>")
        return whole[:begin] + block + whole[end:]
    given = {line.split()[0] for line in block.splitlines() if line}
    lines = [line for line in whole.splitlines(keepends=True) if not given & set(line.split()[:1])]
    at = next(number for number, line in enumerate(lines) if "<s3blobstorage>" in line)
    return "".join([*lines[: at + 1], block, *lines[at + 1 :]])


def parse(path):
    """Parse a configuration as the program does that it is for: Zope, or a ZEO server."""
    import ZEO
    from Zope2.Startup.options import ZopeWSGIOptions

    if "<zeo>" in path.read_text():
        schema = ZConfig.loadSchema(str(Path(ZEO.__file__).with_name("schema.xml")))
        ZConfig.loadConfig(schema, str(path))
    else:
        ZopeWSGIOptions(str(path))()


@pytest.mark.parametrize("block", CONFIGURATIONS)
def test_configurations_are_taken_by_zope_and_by_the_program(block, placed, tmp_path):
    """By Zope's or ZEO's own schema, whole or as the part of a whole."""
    is_whole = "<zodb_db" in block or "<zeo>" in block
    text = placed(block if is_whole else completed(block))
    imports = [line for line in text.splitlines() if line.startswith("%import")]
    home = [] if "<zeo>" in text else [f"instancehome {tmp_path}"]
    rest = [line for line in text.splitlines() if not line.startswith("%import")]
    path = tmp_path / "zope.conf"
    path.write_text("\n".join([*imports, *home, *rest]))
    parse(path)
    if "<s3blobstorage" in text:
        assert find_database(str(path), None).config.bucket_name == "my-site-blobs"


def test_buildout_makes_the_configuration_of_the_page(placed, tmp_path):
    """What the recipe writes, with its options as the page shows them."""
    block = example("plone.rst", "recipe = plone.recipe.zope2instance")
    options = dict(re.findall(r"^([a-z-]+) =((?:.*\n(?:    .*\n)*))", block, re.MULTILINE))
    imports = "\n".join(f"%import {name}" for name in options["zope-conf-imports"].split())
    assert options["blob-storage"].strip() == ""
    storage = "\n".join(["<filestorage>", "path /var/lib/my-site/Data.fs", "</filestorage>"])
    wrapped = options["storage-wrapper"] % storage
    text = f"{imports}\n<zodb_db main>\n{wrapped}\nmount-point /\n</zodb_db>\n"
    path = tmp_path / "zope.conf"
    path.write_text(placed(text))
    config = find_database(str(path), None).config
    expected = tmp_path / "expected.conf"
    expected.write_text(placed(example("plone.rst", SECTION)))
    told = find_database(str(expected), None).config
    names = [name for name in told.getSectionAttributes() if "secret" not in name]
    simple = [name for name in names if isinstance(getattr(told, name), (str, int, type(None)))]
    assert {name: getattr(config, name) for name in simple} == {
        name: getattr(told, name) for name in simple
    }


def test_blocks_are_commands_of_ours_or_configurations():
    """A block of another kind would be run by no test."""
    for path in PAGES:
        for block in blocks(path):
            if not is_configuration(block) and block.startswith("$"):
                first = [line.split()[1] for line in block.splitlines() if line.startswith("$")]
                assert set(first) <= {"zodb-s3blobs", "pip"} or path.name in OTHERS, block


# Commands


class Shown(dict):
    """The tests of commands, by the command as the pages show it."""

    def __call__(self, *lines):
        def register(test):
            self.update(dict.fromkeys(lines, test))
            return test

        return register


SHOWN = Shown()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_of_a_page_exist_and_have_a_test(path):
    """Whoever changes a command's options finds the pages that show it."""
    for line in commands(path):
        _parser().parse_args(shlex.split(line))
        assert path.name in OTHERS or line in SHOWN, line


def test_tests_of_commands_are_of_commands_that_are_shown():
    """What no page shows has its tests elsewhere."""
    assert set(SHOWN) <= {line for path in PAGES for line in commands(path)}


class Site:
    """A site in a directory of its own, which is the current one; its Data.fs has blobs."""

    def __init__(self, location, directory, capsys):
        self.location = location
        self.directory = directory
        self.capsys = capsys
        (directory / "etc").mkdir()
        (directory / "var").mkdir()

    def configure(self, block, name="zope.conf", **more):
        """Write a configuration of the pages, with the places of this site."""
        lines = "".join(f"    {key.replace('_', '-')} {value}\n" for key, value in more.items())
        for shown, here in (
            ("my-site-blobs", self.location.bucket),
            ("https://s3.example.com", self.location.endpoint_url),
            ("    s3-region eu-central-1\n", lines),
            ("/var/cache/my-site", f"{self.directory}/var"),
            ("/var/lib/my-site", f"{self.directory}/var"),
        ):
            block = block.replace(shown, here)
        (self.directory / "etc" / name).write_text(block)
        return self

    def configure_new(self, **more):
        """Have the configuration of a new site, without old blobs."""
        block = example("plone.rst", SECTION)
        begin, end = block.index("    <blobdir-source>"), block.index("  </s3blobstorage>")
        return self.configure(block[:begin] + block[end:], **more)

    def run(self, line):
        """Run a command as it is shown; return (status, output)."""
        self.capsys.readouterr()
        line = line.replace("/var/lib/my-site", f"{self.directory}/var")
        status = main(shlex.split(line))
        return status, self.capsys.readouterr().out

    def db(self):
        """Open the database of zope.conf."""
        text = (self.directory / "etc" / "zope.conf").read_text()
        imports = "\n".join(re.findall("^%import .*", text, re.MULTILINE))
        storage = re.search(r"mount-point /\n(.*)</zodb_db>", text, re.DOTALL)[1]
        return databaseFromString(f"{imports}\n<zodb>\n{storage}\n</zodb>\n")

    def store(self, **files):
        """Commit files into the database."""
        with closing(self.db()) as db, db.transaction() as connection:
            for name, data in files.items():
                connection.root()[name] = Blob(data)

    def files(self):
        """Return the bytes of all files, by name."""
        with closing(self.db()) as db, db.transaction() as connection:
            return {name: read(blob) for name, blob in connection.root().items()}


@pytest.fixture
def site(s3, tmp_path, monkeypatch, capsys):
    """A `Site` that has no configuration yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("S3_ACCESS_KEY", s3.access_key)
    monkeypatch.setenv("S3_SECRET_KEY", s3.secret_key)
    return Site(s3, tmp_path, capsys)


FILES = {"one": random_bytes("one", 1000), "two": random_bytes("two", 2000)}


@SHOWN("-C etc/zope.conf doctor", "-C etc/zope-new.conf doctor")
@pytest.mark.parametrize("name", ["zope.conf", "zope-new.conf"])
def test_doctor(site, name):
    """It tells what works, and the policy."""
    status, output = site.configure_new(name=name).run(f"-C etc/{name} doctor")
    assert status == 0
    assert re.search("^ok +put ", output, re.MULTILINE)
    assert '"s3:PutObject"' in output
    assert keys(site.location) == []


@SHOWN("-C etc/zope.conf doctor --json")
def test_doctor_of_a_staging_copy(site, monkeypatch):
    """Access is read-only there, and no probe writes."""
    monkeypatch.setenv("ZODB_S3BLOBS_ACCESS", "read-only")
    site.configure(example("staging.rst", "local-blob-dir /var"))
    status, output = site.run("-C etc/zope.conf doctor --json")
    assert (status, json.loads(output)["access"]) == (0, "read-only")
    assert "put" not in json.loads(output)["probes"]


@SHOWN("-C etc/zope.conf stats")
def test_stats(site):
    """The cache has what was stored."""
    site.configure_new().store(**FILES)
    status, output = site.run("-C etc/zope.conf stats")
    assert status == 0
    assert f"cache_bytes: {sum(map(len, FILES.values()))}" in output


@SHOWN("-C etc/zope.conf warm")
def test_warm(site):
    """An empty cache is filled, and then S3 is not needed."""
    site.configure_new().store(**FILES)
    site.configure_new()
    conf = site.directory / "etc" / "zope.conf"
    conf.write_text(conf.read_text().replace("/var/blobs\n", "/var/empty\n"))
    status, output = site.run("-C etc/zope.conf warm")
    assert (status, "fetched: 2" in output) == (0, True)
    client = boto3_client(site.location)
    for key in keys(site.location):
        client.delete_object(Bucket=site.location.bucket, Key=key)
    assert site.files() == FILES


@SHOWN("-C etc/zope.conf own", "-C etc/zope.conf own --take")
def test_own(site):
    """A database that was moved is another one, until it takes the bucket."""
    site.configure_new().store(**FILES)
    status, output = site.run("-C etc/zope.conf own")
    assert (status, "is this one: True" in output) == (0, True)
    os.remove("var/Data.fs.s3blobs")
    status, output = site.run("-C etc/zope.conf own")
    assert (status, "is this one: False" in output) == (1, True)
    with pytest.raises(interfaces.OtherDatabaseError):
        site.store(three=b"bytes")
    assert site.run("-C etc/zope.conf own --take")[0] == 0
    site.store(three=b"bytes")
    assert set(site.files()) == {"one", "two", "three"}
    assert site.run("-C etc/zope.conf own")[0] == 0


@SHOWN("-C etc/zope.conf spool", "-C etc/zope.conf spool --drain")
def test_spool(site, rclone):
    """What was stored in an outage is shown, and uploaded afterwards."""
    options = {
        "on_upload_failure": "spool",
        "spool_dir": f"{site.directory}/var/spool",
        "s3_max_attempts": 1,
        "addressing": "record",
    }
    site.configure_new(**options).store(**FILES)
    rclone.stop()
    try:
        site.store(three=b"three bytes")
        status, output = site.run("-C etc/zope.conf spool")
        assert (status, "spool_blobs: 1" in output) == (1, True)
    finally:
        rclone.start()
    status, output = site.run("-C etc/zope.conf spool --drain")
    assert (status, "spool_blobs: 0" in output) == (0, True)
    conf = site.directory / "etc" / "zope.conf"
    conf.write_text(conf.read_text().replace("/var/blobs\n", "/var/empty\n"))
    assert site.files() == {**FILES, "three": b"three bytes"}


def test_copy_with_a_bucket_of_its_own(site):
    """It reads production's blobs, and stores, changes and packs below its own prefix alone."""
    site.configure_new().store(**FILES)
    before = keys(site.location)
    (site.directory / "staging").mkdir()
    copy = Site(site.location, site.directory / "staging", site.capsys)
    shutil.copy("var/Data.fs", "staging/var/Data.fs")
    copy.configure(example("staging.rst", "<bucket-source>"))
    assert copy.files() == FILES
    copy.store(one=b"changed", three=b"three bytes")
    with closing(copy.db()) as db:
        db.pack()
    expected = {**FILES, "one": b"changed", "three": b"three bytes"}
    assert copy.files() == expected
    assert [key for key in keys(site.location) if not key.startswith("staging/")] == before
    assert len(keys(site.location, "staging/blobs/")) == 2
    assert site.files() == FILES


OLD_FILES = {f"old{number}": random_bytes(number, 1000 + number) for number in range(5)}


@pytest.fixture
def moving(site):
    """A `Site` that has gone live with its old blobs in a directory, and stored more since."""
    site.configure(example("plone.rst", "blob-dir")).store(**OLD_FILES)
    site.configure(example("plone.rst", SECTION)).store(**FILES)
    return site


def blob_keys(site):
    """Return the keys of blobs in the bucket of a site."""
    return keys(site.location, "main/blobs/")


@SHOWN(
    "-C etc/zope.conf migrate",
    "-C etc/zope.conf migrate --time-limit 2h",
    "-C etc/zope.conf migrate --verify",
    "-C etc/zope.conf manifest --compare",
    "-C etc/zope.conf check",
)
def test_moving_in(moving):
    """The steps of the page, and then the directory is not needed."""
    assert len(blob_keys(moving)) == len(FILES)
    assert moving.run("-C etc/zope.conf manifest --compare")[0] == 1
    assert moving.run("-C etc/zope.conf migrate")[0] == 0
    assert len(blob_keys(moving)) == len(FILES) + len(OLD_FILES)
    assert moving.run("-C etc/zope.conf migrate --time-limit 2h")[0] == 0
    assert moving.run("-C etc/zope.conf migrate --verify")[0] == 0
    assert moving.run("-C etc/zope.conf manifest --compare")[0] == 0
    assert moving.run("-C etc/zope.conf check")[0] == 0
    moving.configure_new()
    shutil.rmtree("var/blobstorage")
    shutil.rmtree("var/blobs")
    assert moving.files() == {**OLD_FILES, **FILES}


@SHOWN(
    "-C etc/zope.conf migrate --remove-local",
    "-C etc/zope.conf migrate --remove-local --delete",
)
def test_letting_go_of_the_directory(moving):
    """Files are removed only when that is said, and all of them are in the bucket."""

    def files():
        return [path for path in Path("var/blobstorage").rglob("*.blob") if path.is_file()]

    assert moving.run("-C etc/zope.conf migrate --remove-local")[0] == 0
    assert len(files()) == len(OLD_FILES)
    assert moving.run("-C etc/zope.conf migrate --remove-local --delete")[0] == 0
    assert files() == []
    shutil.rmtree("var/blobs")
    assert moving.files() == {**OLD_FILES, **FILES}


@SHOWN("-C etc/zope.conf migrate --from-blob-dir /var/lib/my-site/blobstorage")
def test_moving_in_from_a_directory_that_the_configuration_does_not_name(moving):
    """As on a ZEO server's host."""
    moving.configure_new()
    line = "-C etc/zope.conf migrate --from-blob-dir /var/lib/my-site/blobstorage"
    assert moving.run(line)[0] == 0
    assert moving.files() == {**OLD_FILES, **FILES}


@SHOWN("-C etc/zope-new.conf migrate --from-relstorage")
def test_moving_in_from_tables(site):
    """Before the restart, and once more after the site was stopped."""
    storage = [
        "<relstorage>",
        "keep-history false",
        *("{}", "<sqlite3>", f"data-dir {site.directory}/var/data", "</sqlite3>", "</relstorage>"),
    ]
    old = "\n".join(storage).format(f"shared-blob-dir false\nblob-dir {site.directory}/var/old")
    text = example("plone.rst", "<relstorage>")
    begin, end = text.index("    <relstorage>"), text.index("  </s3blobstorage>")
    new = text[:begin] + "\n".join(storage).format("") + "\n" + text[end:]
    site.configure(f"%import relstorage\n<zodb_db main>\nmount-point /\n{old}\n</zodb_db>\n")
    site.configure(new, "zope-new.conf")
    site.store(**OLD_FILES)
    assert site.run("-C etc/zope-new.conf migrate --from-relstorage")[0] == 0
    site.store(**FILES)
    assert site.run("-C etc/zope-new.conf migrate --from-relstorage")[0] == 0
    site.configure(new)
    shutil.rmtree("var/old")
    assert site.files() == {**OLD_FILES, **FILES}


@SHOWN("-C etc/zope.conf export /var/lib/my-site/back")
def test_going_back(moving):
    """Plain ZODB opens the directory; a second run copies what was stored since."""
    line = "-C etc/zope.conf export /var/lib/my-site/back"
    moving.run("-C etc/zope.conf migrate")
    assert moving.run(line)[0] == 0
    moving.store(three=b"three bytes")
    assert moving.run(line)[0] == 0
    old = example("plone.rst", "blob-dir").replace("my-site/blobstorage", "my-site/back")
    moving.configure(old)
    assert moving.files() == {**OLD_FILES, **FILES, "three": b"three bytes"}


@SHOWN("-C etc/zope.conf export --by-tid")
def test_going_back_to_the_older_package(site):
    """What was kept by record has the keys of tids then."""
    site.configure_new(addressing="record", gc_grace="0s").store(**FILES)
    assert site.run("-C etc/zope.conf export --by-tid")[0] == 0
    with closing(site.db()) as db:
        db.pack()
    names = [key.rpartition("/")[2] for key in blob_keys(site)]
    assert all(re.fullmatch("[1-9a-f][0-9a-f]{0,15}.blob", name) for name in names)
    shutil.rmtree("var/blobs")
    assert site.files() == FILES


@SHOWN("-C etc/zope.conf gc", "-C etc/zope.conf gc --delete")
def test_gc(site):
    """What no record refers to is shown first, and deleted when that is said."""
    site.configure_new().store(**FILES)
    client = boto3_client(site.location)
    client.put_object(Bucket=site.location.bucket, Key="main/blobs/1/1.blob", Body=b"garbage")
    status, output = site.run("-C etc/zope.conf gc")
    assert (status, "garbage: 1" in output) == (0, True)
    assert "main/blobs/1/1.blob" in blob_keys(site)
    assert site.run("-C etc/zope.conf gc --delete")[0] == 0
    assert len(blob_keys(site)) == len(FILES)
    assert site.files() == FILES


@SHOWN("-C etc/zope.conf check --depth read --repair")
def test_check_repairs(site):
    """An object that was lost comes back from the cache."""
    site.configure_new().store(**FILES)
    before = blob_keys(site)
    client = boto3_client(site.location)
    client.delete_object(Bucket=site.location.bucket, Key=before[0])
    assert site.run("-C etc/zope.conf check")[0] == 1
    site.run("-C etc/zope.conf check --depth read --repair")
    assert blob_keys(site) == before
    assert site.run("-C etc/zope.conf check")[0] == 0
    shutil.rmtree("var/blobs")
    assert site.files() == FILES


# Errors and log lines


def test_every_error_class_is_explained():
    """With what to do."""
    page = (DOCS / "troubleshooting.rst").read_text()
    names = [
        name
        for name, value in vars(interfaces).items()
        if isinstance(value, type)
        and issubclass(value, interfaces.S3OperationError)
        and value.__module__ == interfaces.__name__
    ]
    assert len(names) >= 8
    for name in names:
        assert f"\n``{name}``" in page, name


def remedies():
    """Return what the errors of S3 ask for, as their texts have it."""
    tree = ast.parse(Path(s3errors.__file__).read_text())
    constants = vars(s3errors)
    found = {*constants["_REMEDIES"].values(), *constants["_HINTS"].values()}
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name in ("_from_answer", "_from_botocore", "translated")
    ]
    docstrings = [ast.get_docstring(function, clean=False) for function in functions]
    for node in (node for function in functions for node in ast.walk(function)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text not in docstrings:
            found.add(text)
    return found


NO_REMEDIES = {
    # What an error says before its remedy
    "no such object", "other bytes arrived (", "the server answered ", "boto3 refused it (",
    "TLS failed (", "the answer cannot be read (", " (the server's is ",
    " so that a missing object is told apart from a denied one",
}  # fmt: skip


def test_every_remedy_is_explained():
    """Quoted as the errors have it."""
    page = text_of("troubleshooting.rst")
    for text in remedies():
        words = text.replace("{permission}", "…").strip(" ;:,()")
        if len(words.split()) < 3 and not words.startswith(("check ", "grant ")):
            continue
        if any(text in each or each in text for each in NO_REMEDIES):
            continue
        assert words in page, words


def warnings():
    """Return the words of all lines that are logged as a warning or worse."""
    return {
        END_OF_WORDS.split(str(node.args[0].value))[0]
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("logger.")
        and node.func.attr not in ("debug", "info")
    }


def test_every_warning_in_the_log_is_explained():
    """With what to do about it."""
    page = (DOCS / "troubleshooting.rst").read_text()
    section = page[page.index("In the log\n") :]
    assert warnings() <= set(re.findall("``([^`]+)``", section))


@pytest.mark.parametrize(
    "given, wrong, words",
    [
        ("%import zodb_s3blobs\n", "", "unknown type name: 's3blobstorage'"),
        ("$(S3_ACCESS_KEY)", "$(NOBODY_HAS_SET_THIS)", "no replacement for"),
        ("$(S3_ACCESS_KEY)", "$S3_ACCESS_KEY", "no replacement for"),
        ("s3-secret-key $(S3_SECRET_KEY)", "", "s3-access-key and s3-secret-key go together"),
        ("cache-size 20GB", "s3-use-ssl false", "s3-use-ssl contradicts s3-endpoint-url"),
        ("<filestorage>", "<filestorage>\nblob-dir old", "the storage inside has a blob-dir"),
        ("cache-size 20GB", "spool-dir /var/cache/my-site", "are not apart from each other"),
        ("/blobstorage", "/not-mounted", "there is no directory"),
        ("cache-size 20GB", "on-upload-failure spool", "needs a spool-dir"),
    ],
)
def test_refused_configurations_are_explained(placed, given, wrong, words):
    """By the words that a start of the site prints."""
    text = example("plone.rst", SECTION).replace("  mount-point /\n", "")
    text = placed(text.replace(given, wrong, 1)).replace("zodb_db main", "zodb")
    with pytest.raises(ZConfig.ConfigurationError) as caught:
        databaseFromString(text.replace("zodb_db", "zodb"))
    assert words in str(caught.value)
    page = text_of("troubleshooting.rst")
    assert words in page[page.index("When a site does not start") :]


def test_pages_are_all_in_the_index():
    """And the index has no others."""
    text = (DOCS / "index.rst").read_text()
    listed = re.search(r"toctree::\n\n((?: +.*\n)+)", text)[1].split()
    present = {path.stem for path in PAGES} - {"index"}
    assert set(listed) - {"backup"} == present - {"backup"}


def test_pages_are_valid_restructuredtext():
    """What Sphinx alone knows is left out of that."""
    import docutils.core
    import docutils.utils

    for path in PAGES:
        text = re.sub(r":doc:`([^`]+)`", r"\1", path.read_text())
        text = re.sub(r"\.\. toctree::\n\n(?: +.*\n)+", "", text)
        settings = {"report_level": 2, "halt_level": 2, "warning_stream": None}
        docutils.core.publish_doctree(text, settings_overrides=settings)
