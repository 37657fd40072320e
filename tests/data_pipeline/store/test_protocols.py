"""https:// and file:// against the same text on disk, and one line for what cannot be reached: the real command."""

import datetime
import ipaddress
import os
import subprocess
import sys
import threading

import pytest

from tests.data_pipeline.conftest import REPOSITORY, write_corpus

pytest.importorskip("aiohttp")
flask = pytest.importorskip("flask")
x509 = pytest.importorskip("cryptography.x509")


def write_certificate(folder):
    """A certificate for 127.0.0.1 that signs itself, and its key, in one file."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "corpus server of a test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_corpus(folder / "corpus.jsonl", 300, seed=2)
    return folder / "corpus.jsonl"


@pytest.fixture(scope="module")
def web(corpus, tmp_path_factory):
    """An HTTPS server of the corpus: its URL, and its certificate's file."""
    from werkzeug.serving import make_server

    app = flask.Flask("corpus")
    app.add_url_rule("/corpus/<name>", "corpus", lambda name: flask.send_from_directory(corpus.parent, name))
    certificate = write_certificate(tmp_path_factory.mktemp("certificate"))
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=(str(certificate), str(certificate)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}", certificate
    server.shutdown()
    thread.join()


def prepare(path, out, model_path, **environment):
    command = ["source=jsonl", f"path={path}", f"out={out}", f"tokenizer={model_path}", "retries=1"]
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.prepare", *command],
        cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr


def shards(out):
    """name -> contents of the token files below `out`."""
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.bin"))}


def test_https_and_file_give_the_shards_of_the_file(web, corpus, model_path, tmp_path):
    url, certificate = web
    assert prepare(corpus, tmp_path / "here", model_path)[0] == 0
    want = shards(tmp_path / "here")
    assert sum(map(len, want.values())) > 10_000
    for name, path in (("https", f"{url}/corpus/corpus.jsonl"), ("file", corpus.as_uri())):
        code, said = prepare(path, tmp_path / name, model_path, SSL_CERT_FILE=str(certificate))
        assert code == 0, said
        assert shards(tmp_path / name) == want


UNREACHABLE = {
    "not trusted": ("{url}/corpus/corpus.jsonl", ["certificate"]),
    "nobody there": ("https://127.0.0.1:9/corpus.jsonl", ["after 2 attempts", "Cannot connect"]),
    "no such protocol": ("nope://host/corpus.jsonl", ["Protocol not known: nope"]),
    "not a repository": ("hf://corpus.jsonl", ["corpus.jsonl"]),
    "offline": ("hf://datasets/some/corpus/corpus.jsonl", ["offline mode is enabled"]),
    "no such file": ("file:///no/such/corpus.jsonl", ["no such file"]),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_cannot_be_reached_is_one_line(case, web, model_path, tmp_path):
    path, words = UNREACHABLE[case]
    if path.startswith("hf:"):
        pytest.importorskip("huggingface_hub")
    path = path.format(url=web[0])
    assert_refused(*prepare(path, tmp_path / "out", model_path, HF_HUB_OFFLINE="1"), path, *words)


def test_a_page_that_is_not_there_is_one_line(web, model_path, tmp_path):
    path = f"{web[0]}/corpus/other.jsonl"
    said = prepare(path, tmp_path / "out", model_path, SSL_CERT_FILE=str(web[1]))
    assert_refused(*said, path, "no such file")


def test_google_storage_names_the_package_it_needs(model_path, tmp_path):
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        said = prepare("gs://bucket/corpus.jsonl", tmp_path / "out", model_path)
        assert_refused(*said, "gs://bucket/corpus.jsonl", "gcsfs")
    else:
        pytest.skip("gcsfs is installed here, and would look for a network")


def assert_refused(code, said, *words):
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    for word in words:
        assert word in said
