"""Settings: where they come from, which wins, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from distroml.config import NodeConfig, detector_settings, load, raft_settings
from distroml.errors import ConfigError
from distroml.settings import NodeSettings, build_parser, unknown_variables
from distroml.store_urls import StoreSettings

THREE = "a=127.0.0.1:7101,b=127.0.0.1:7102,c=127.0.0.1:7103"


def config(*argv: str, **environ: str) -> NodeConfig:
    return load(argv, environ)


def refusal(*argv: str, **environ: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(argv, environ)
    assert "\n" not in caught.value.detail
    return caught.value


def toml(directory: Path, text: str) -> str:
    path = directory / "node.toml"
    path.write_text(text)
    return str(path)


def test_without_any_setting_it_is_a_one_node_cluster() -> None:
    made = config(HOME="/home/someone")
    assert list(made.voters) == [made.name]
    assert made.listen is None
    assert made.host == "127.0.0.1"
    assert made.slots >= 1
    assert made.data_dir.name == made.name


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'name = "file"\nslots = 1\nworker_threads = 2\n')
    made = config("--config", file, "--name", "flag", DISTROML_NAME="variable", DISTROML_SLOTS="3")
    assert (made.name, made.slots, made.settings.worker_threads) == ("flag", 3, 2)


def test_names_by_which_a_node_may_be_called() -> None:
    assert config().allowed_hosts == ()
    assert config("--allowed-hosts", "lb.example, Train.example").allowed_hosts == (
        "lb.example",
        "train.example",
    )
    assert config(DISTROML_ALLOWED_HOSTS="*").allowed_hosts == ("*",)


@pytest.mark.parametrize(
    "given", ["http://lb.example", "lb.example:8101", "*.example", "a,,b", "a b"]
)
def test_what_is_no_name_of_a_host_is_refused(given: str) -> None:
    error = refusal("--allowed-hosts", given)
    assert error.field == "allowed_hosts"
    assert "without scheme and port" in error.detail


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    assert config(DISTROML_CONFIG=toml(tmp_path, 'name = "x"')).name == "x"


def test_every_setting_is_a_flag_a_variable_and_a_key(tmp_path: Path) -> None:
    flags = build_parser().format_help()
    for name in NodeSettings.__struct_fields__:
        assert f"--{name.replace('_', '-')} " in flags.replace("\n", " ").replace("]", " ")
    assert config(DISTROML_INSECURE="true").settings.insecure
    assert config("--insecure").settings.insecure
    assert config("--config", toml(tmp_path, "insecure = true")).settings.insecure


def test_what_a_node_says_of_s3_reaches_its_stores(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\n")
    file.chmod(0o644)
    given = ["--s3-region", "eu-central-1", "--s3-credentials-file", str(file)]
    assert "chmod 600" in refusal(*given).detail
    file.chmod(0o600)
    stores = config(*given, DISTROML_S3_ENDPOINT="http://127.0.0.1:9000").stores
    assert stores == StoreSettings(
        s3_endpoint="http://127.0.0.1:9000",
        s3_region="eu-central-1",
        s3_credentials_file=str(file),
    )


@pytest.mark.parametrize(
    ("argv", "field", "said"),
    [
        (["--s3-endpoint", "minio"], "s3_endpoint", "must be the URL of a server"),
        (["--s3-endpoint", "http://me:x@h"], "s3_endpoint", "must not hold credentials"),
        (["--s3-credentials-file", "/none"], "s3_credentials_file", "cannot be read"),
        (["--slots", "many"], "slots", "flags: slots: Expected `int`"),
        (["--slots", "-1"], "slots", ">= 0"),
        (["--name", "../up"], "name", "not a node name"),
        (["--peers", THREE], "name", "not in peers (a, b, c)"),
        (["--peers", f"{THREE},d=127.0.0.1:7101", "--name", "a"], "peers", "twice"),
        (["--peers", f"{THREE},127.0.0.1:9", "--name", "a"], "peers", "one form for all"),
        (["--peers", THREE, "--name", "a", "--join", THREE], "join", "set one of them"),
        (["--peers", THREE, "--name", "a", "--advertise", "h:1"], "advertise", "for learners"),
        (["--join", THREE, "--name", "d"], "listen", "connect back"),
        (["--join", THREE, "--name", "a", "--listen", "127.0.0.1:9"], "name", "one of the voters"),
        (["--join", THREE, "--name", "d", "--listen", "127.0.0.1:7101"], "listen", "of its own"),
        (
            ["--join", THREE, "--name", "d", "--listen", "0.0.0.0:9", "--insecure"],
            "advertise",
            "wildcard",
        ),
        (["--join", "nowhere", "--name", "d", "--listen", "127.0.0.1:9"], "join", "host:port"),
        (["--peers", "127.0.0.1:1,127.0.0.1:2"], "listen", "--listen"),
        (["--peers", "a=nowhere", "--name", "a"], "peers", "host:port"),
        (["--peers", "a=127.0.0.1:0", "--name", "a"], "peers", "no fixed port"),
        (["--listen", "127.0.0.1:7101"], "listen", "one-node"),
        (["--http", "127.0.0.1:0"], "http", "no fixed port"),
        (["--http", "0.0.0.0:80"], "http", "--insecure"),
        (["--log-level", "loud"], "log_level", "loud"),
        (["--data-dir", "a\0b"], "data_dir", "not a path"),
        (["--election-timeout-ms", "180"], "heartbeat_ms", "under a third"),
        (["--node-timeout-ms", "300"], "report_interval_ms", "at most a third"),
        (
            ["--peers", ",".join(f"n{i}=127.0.0.1:{i + 1}" for i in range(8)), "--name", "n0"],
            "peers",
            "at most 7",
        ),
    ],
)
def test_a_wrong_setting_is_named(argv: list[str], field: str, said: str) -> None:
    error = refusal(*argv)
    assert error.field == field
    assert said in error.detail


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slot = 3", "'slot' is not a setting (perhaps slots was meant)"),
        ("slots = 'x'", "slots: Expected `int`"),
        ("[peers]\na = 1", "peers: Expected `str`"),
        ("slots", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = toml(tmp_path, text)
    error = refusal("--config", file)
    assert file in error.detail
    assert said in error.detail


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refusal("--config", str(binary)).detail
    assert "Is a directory" in refusal("--config", str(tmp_path)).detail
    assert "No such file" in refusal("--config", str(tmp_path / "none")).detail


def test_a_wrong_variable_is_named() -> None:
    assert refusal(DISTROML_SLOTS="many").detail.startswith("environment: slots:")


def test_unknown_variables_are_told_with_what_was_meant() -> None:
    (warning,) = unknown_variables(
        {
            "DISTROML_DATADIR": "/x",
            "DISTROML_DATA_DIR": "/x",
            "DISTROML_URL": "http://a",
            "DISTROML_CONFIG": "f",
            "OTHER": "",
        }
    )
    assert "DISTROML_DATADIR is not a setting" in warning
    assert "DISTROML_DATA_DIR" in warning


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        config("--slot", "3")
    assert caught.value.code == 2
    assert "--slot" in capsys.readouterr().err


def test_peers_without_names_are_named_by_their_address() -> None:
    for own, host in (("127.0.0.1:7101", "127.0.0.1"), ("[::1]:7101", "::1")):
        made = config("--peers", f"{own},localhost:7102", "--listen", own)
        assert made.name == own
        assert set(made.voters) == {own, "localhost:7102"}
        assert made.host == host
        assert ":" not in made.data_dir.name


def test_a_learner_is_reached_where_it_says_and_is_no_voter() -> None:
    argv = ["--join", THREE, "--name", "d", "--listen", "0.0.0.0:9", "--insecure"]
    made = config(*argv, "--advertise", "10.0.0.4:9", "--http", "0.0.0.0:8")
    assert (made.name, sorted(made.voters), made.host) == ("d", ["a", "b", "c"], "10.0.0.4")
    assert (str(made.listen), str(made.advertise)) == ("0.0.0.0:9", "10.0.0.4:9")
    assert made.http_url == "http://10.0.0.4:8"


def test_workers_are_reached_at_the_address_in_peers_not_at_a_wildcard() -> None:
    argv = ["--peers", "a=10.0.0.1:7101,b=10.0.0.2:7101", "--name", "a", "--insecure"]
    made = config(*argv, "--listen", "0.0.0.0:7101", "--http", "0.0.0.0:8101")
    assert made.host == "10.0.0.1"
    assert made.http_url == "http://10.0.0.1:8101"


@pytest.mark.parametrize(
    ("election_ms", "heartbeat_ms"), [(181, 60), (300, 99), (12_000, 3999), (60_000, 10_000)]
)
def test_timing_that_passes_is_timing_that_raft_takes(election_ms: int, heartbeat_ms: int) -> None:
    made = config("--election-timeout-ms", str(election_ms), "--heartbeat-ms", str(heartbeat_ms))
    timing = raft_settings(made.settings)
    assert timing.heartbeat_s < timing.election_min_s < timing.election_max_s


def test_a_node_that_reports_seldom_is_not_suspected_between_reports() -> None:
    made = config("--report-interval-ms", "5000", "--node-timeout-ms", "20000")
    timing = detector_settings(made.settings)
    assert 5 < timing.suspect_silence_s <= timing.silence_s == 20
    assert timing.first_word_s > 5


@pytest.mark.parametrize("endpoint", ["", "env", "http://collector:4318", "https://c.example/otlp"])
def test_a_collector_is_named_by_its_url_or_by_opentelemetrys_own_variable(endpoint: str) -> None:
    assert config("--otlp-endpoint", endpoint).settings.otlp_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint",
    ["collector:4318", "grpc://c:4317", "http://", "http://c:0", "http://c:x", "http://c/?a"],
)
def test_what_is_no_collector_is_refused(endpoint: str) -> None:
    error = refusal(DISTROML_OTLP_ENDPOINT=endpoint)
    assert error.field == "otlp_endpoint"
    assert f"'{endpoint}'" in error.detail


def test_a_password_in_the_url_of_a_collector_is_refused_and_not_repeated() -> None:
    error = refusal(DISTROML_OTLP_ENDPOINT="http://me:secret@collector:4318")
    assert "OTEL_EXPORTER_OTLP_HEADERS" in error.detail
    assert "secret" not in error.detail
