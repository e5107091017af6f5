"""Lists of hosts in the dialects that people, launchers and schedulers write, and what is refused with its line."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_eurosat.cluster import hosts, node
from hvd_eurosat.cluster.hostlist import WRITE, expand, parse
from hvd_eurosat.errors import UserError


def nowhere(name: str) -> bool:
    return name == "localhost"


def read(text: str, here: Callable[[str], bool] = nowhere) -> list[tuple[str, int]]:
    return [(host.name, host.slots) for host in parse(text, "hosts.txt", here)]


TWO = [("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("dialect", "text", "meant"),
    [
        ("Open MPI", "a slots=2\nb slots=2", TWO),
        ("Open MPI, with the most", "a slots=2 max_slots=2\nb max-slots=4 slots=2", TWO),
        ("Open MPI, the most alone", "a max_slots=2\nb slots-max=2", TWO),
        ("Open MPI, spaces around =", "a slots = 2\nb  slots= 2", TWO),
        ("Open MPI, its other words", "a cpu=2\nb count=2", TWO),
        ("Open MPI, comments", "# ours\na slots=2 # first\n// b is new\nb slots=2", TWO),
        ("Open MPI, a name for each rank", "a\na\nb\nb", TWO),
        ("Kubeflow's operator", "job-worker-0.job slots=2\njob-worker-1.job slots=2", None),
        ("MPICH and Intel MPI", "a:2\nb:2", TWO),
        ("DeepSpeed", "a slots=2\nb slots=2\n", TWO),
        ("LAM", "a cpu=2\nb cpu=2", TWO),
        ("machines of old", "a 2\nb\t2", TWO),
        ("PBS", "b\na\nb\na", [("b", 2), ("a", 2)]),
        ("LSF, a file", "a\na\nb\nb\n", TWO),
        ("LSF, a variable", "a 2 b 2", TWO),
        ("Grid Engine", "a 2 all.q@a UNDEFINED\nb 2 all.q@b <NULL>", TWO),
        ("Grid Engine, two queues", "a 1 all.q@a UNDEFINED\nb 2 all.q@b UNDEFINED\na 1 gpu.q@a UNDEFINED", TWO),
        ("Grid Engine, processors", "a 2 all.q@a 0,0:0,1\nb 2 all.q@b 0,2", TWO),
        ("Slurm", "node[01-02]:2", [("node01", 2), ("node02", 2)]),
        ("Slurm, many", "n[8-10,12]g[0-1] slots=1", None),
        ("a line", "a:2,b:2", TWO),
        ("a line with spaces", "a:2, b:2", TWO),
        ("a line with slots", "a slots=2, b slots=2", TWO),
        ("a line of names", "a a b b", TWO),
        ("horovodrun", "a slots=2\nb slots=2", TWO),
        ("addresses", "10.0.0.1:2\n10.0.0.2:2", [("10.0.0.1", 2), ("10.0.0.2", 2)]),
        ("Windows", "a slots=2\r\nb slots=2\r\n", TWO),
        ("capitals", "a SLOTS=2\nB:1", [("a", 2), ("B", 1)]),
        ("one host, twice in other capitals", "Node1\nnode1", [("Node1", 2)]),
        ("full names", "a.x.org:2\na.y.org:2", [("a.x.org", 2), ("a.y.org", 2)]),
    ],
)
def test_dialects(dialect: str, text: str, meant: list[tuple[str, int]] | None) -> None:
    found = read(text)
    if dialect.startswith("Kubeflow"):
        meant = [("job-worker-0.job", 2), ("job-worker-1.job", 2)]
    if dialect == "Slurm, many":
        meant = [(f"n{n}g{g}", 1) for n in (8, 9, 10, 12) for g in (0, 1)]
    assert found == meant


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("b slots=", "'' is no number of slots"),
        ("b slots=0", "'0' is no number of slots"),
        ("b slots=two", "'two' is no number of slots"),
        ("b slots=1000000", "'1000000' is no number of slots"),
        ("b slots 2", "'slots' is no host"),
        ("b: 2", "'b:' is no host"),
        ("b:2:mlx5_0", "'b:2:mlx5_0' is no host"),
        ("b:2 slots=2", "host b has a number of slots already"),
        ("b 2 3", "host b has a number of slots already"),
        ("b slots=4 max_slots=2", "host b has 4 slots, and at most 2"),
        ("b gpus=2", "'gpus=2' is nothing that is known of a host"),
        ("b ifhn=b-ib", "'ifhn=b-ib' is nothing that is known of a host"),
        ("rank 0=b slot=0-3", "'0=b' is nothing that is known of a host"),
        ("2 b", "'2' is no host"),
        ("slots=2 b", "'slots=2' is no host"),
        ("8:2", "'8:2' is no host"),
        ("[1-2]:8", "'[1-2]:8' is no host"),
        ("b c slots=2", "of which host is the number of slots? b has none"),
        ("^b", "'^b' is no host"),
        ("+n0", "'+n0' is no host"),
        ("-oProxyCommand=x", "is no host"),
        ("b;c", "'b;c' is no host"),
        ("/* b */", "'/*' is no host"),
        ("node[01-", "'node[01-' is no host"),
        ("node[4-1]", "'node[4-1]' is a range of no hosts"),
        ("node[1-99999999999]", "'node[1-99999999999]' is a range of no hosts, or of more than 100,000"),
        ("node[0-9/2]", "'node[0-9/2]' is no host"),
        ("fred@b slots=2", "the user of a host is for ~/.ssh/config to say: Host b, and below it User NAME"),
        ("b slots=2 username=fred", "the user of a host is for ~/.ssh/config to say: Host b, "),
        ("2001:db8::7 slots=2", "launchers know no IPv6 addresses: name it in /etc/hosts or ~/.ssh/config"),
        ("[2001:db8::7]:2", "launchers know no IPv6 addresses: name it in /etc/hosts or ~/.ssh/config"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_line(line: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        read(f"a slots=2\n\n{line}\n")
    assert str(error.value).startswith("hosts.txt, line 3: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_host_that_is_named_twice() -> None:
    with pytest.raises(UserError, match=r"host a is named twice \(lines 1, 3\), with a number") as error:
        read("a slots=2\nb\na slots=2")
    assert str(error.value).endswith("name it once")
    with pytest.raises(UserError, match="host a is named twice, with a number of slots"):
        read("a:1,a")
    with pytest.raises(UserError, match="host a, which is a1, is named twice"):
        read("a:1,a1:1", lambda name: name in ("a", "a1"))
    assert read("a,127.0.0.1,b", lambda name: name in ("a", "127.0.0.1")) == [("a", 2), ("b", 1)]
    with pytest.raises(UserError, match=re.escape(f"no host in hosts.txt: {WRITE}")):
        read("# nothing\n\n")


NAMES = st.builds("n{}{}".format, st.text("ab01-", max_size=4), st.sampled_from(["", ".x", ".y.org"]))
WRITINGS: list[Callable[[str, int], str]] = [
    lambda name, slots: f"{name} slots={slots}",
    lambda name, slots: f"\t{name}  slots = {slots}  # {slots + 1} soon",
    lambda name, slots: f"{name} max_slots={slots + 1} slots={slots}",
    lambda name, slots: f"{name} slots={slots} max-slots={slots}",
    lambda name, slots: f"{name} count={slots}",
    lambda name, slots: f"{name}:{slots}",
    lambda name, slots: f"{name} {slots}\r",
    lambda name, slots: "\n".join([name] * slots),
    lambda name, slots: ", ".join([name] * slots),
    lambda name, slots: f"{name} {slots} all.q@{name} UNDEFINED",
]
BY_NO_CLOCK = settings(deadline=None, derandomize=True, database=None)
MEANT = st.dictionaries(NAMES, st.tuples(st.integers(1, 9), st.sampled_from(WRITINGS)), min_size=1, max_size=5)


@BY_NO_CLOCK
@given(MEANT)
def test_what_is_written_is_what_was_meant(meant: dict[str, tuple[int, Callable[[str, int], str]]]) -> None:
    text = "\n".join(write(name, slots) for name, (slots, write) in meant.items())
    assert read(text) == [(name, slots) for name, (slots, _) in meant.items()]


FOREIGN = st.text(st.sampled_from("ab1:=[-@^+!;,./ "), min_size=1, max_size=8)


@BY_NO_CLOCK
@given(MEANT, FOREIGN)
def test_no_host_and_no_slot_is_guessed(meant: dict[str, tuple[int, Callable[[str, int], str]]], line: str) -> None:
    """A line of any signs is refused by its number, or each of its words is a host or the number of one."""
    lines = [f"{name}:{slots}" for name, (slots, _) in meant.items()]
    try:
        found = read("\n".join([*lines, line, ""]))
        refused = ""
    except UserError as error:
        found, refused = [], str(error)
    if refused:
        assert f", line {len(lines) + 1}: " in refused or "is named twice" in refused
        return
    expected = sum(slots for slots, _ in meant.values())
    for word in re.split("[ ,]+", re.sub("//.*", "", line)):
        if word.isdigit():
            expected += int(word) - 1  # the host before it counts for one
        elif word:
            name, _, number = word.partition(":")
            assert re.fullmatch("[ab1][ab1.-]*", name) or word.startswith(":"), "what else were a name?"
            expected += int(number) if number.isdigit() else 1
    assert sum(slots for _, slots in found) == expected


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("a", ["a"]),
        ("node[01-03]", ["node01", "node02", "node03"]),
        ("node[8-10]", ["node8", "node9", "node10"]),
        ("node[098-101]", ["node098", "node099", "node100", "node101"]),
        ("n[1,3-4].x.org", ["n1.x.org", "n3.x.org", "n4.x.org"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_ranges(names: str, hosts: list[str]) -> None:
    assert expand(names) == hosts


NOT_HERE = "203.0.113.7"  # an address for documents, RFC 5737


def test_this_machine_by_all_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"alias": "127.0.1.1", "elsewhere": NOT_HERE, "own.x.org": "127.0.0.1", "own.y.org": NOT_HERE}
    resolve = socket.getaddrinfo

    def resolved(name: str, *arguments: object, **options: object) -> object:
        return resolve(known.get(name, name if name[:1].isdigit() or ":" in name else "203.0.113.9"), None)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket, "gethostname", lambda: "own.x.org")
    for cached in (hosts.is_here, hosts.addresses):
        cached.cache_clear()
    own = ("localhost", "LOCALHOST", "own", "own.x.org", "Own.X.org", "127.0.0.1", "127.3.2.1", "127.1", "::1", "alias")
    assert [name for name in own if not hosts.is_here(name)] == []
    assert not any(map(hosts.is_here, ("elsewhere", "own.y.org", NOT_HERE, "nobody", "2001:db8::7", "0.0.0.0")))
    assert [h.name for h in parse("::1:2\nelsewhere:1".replace("::1:2", "[::1]:2"), "", hosts.is_here)] == [
        "localhost",
        "elsewhere",
    ]


def test_own_addresses_of_interfaces() -> None:
    import psutil

    kinds = (socket.AF_INET, socket.AF_INET6)
    own = {one.address for known in psutil.net_if_addrs().values() for one in known if one.family in kinds}
    named = [address for address in own if "%" not in address]  # not those of a link, by which nobody names a host
    assert named
    assert [address for address in named if not hosts.is_here(address)] == []


def test_full_names_that_share_their_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"a.x": {"203.0.113.1"}, "a.y": {"203.0.113.2"}, "a": {"203.0.113.1"}}
    monkeypatch.setattr(hosts, "addresses", lambda name: frozenset(known.get(name, ())))

    def alike(text: str) -> bool:
        return hosts.cut_alike(parse(text, "", nowhere))

    assert alike("a.x:1,a.y:1")
    assert not alike("a.x:1,b.x:1")
    assert not alike("10.0.0.1:1,10.0.0.2:1"), "Open MPI does not cut addresses"
    with pytest.raises(UserError, match=r"hosts a\.x and a have one address: name it once, with all its slots"):
        alike("a.x:1,a:1")


def listed(environment: dict[str, str], ranks: int | None = None) -> list[tuple[str, int]]:
    return [(host.name, host.slots) for host in hosts.find(None, None, ranks, environment).hosts]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PBS_NODEFILE", "a\nb\na\nb\n"),
        ("LSB_DJOB_HOSTFILE", "a\na\nb\nb\n"),
        ("PE_HOSTFILE", "a 2 all.q@a UNDEFINED\nb 2 all.q@b UNDEFINED\n"),
        ("PE_HOSTFILE", "a 2\nb 2\n"),
        ("OAR_NODEFILE", "a\na\nb\nb\n"),
        ("OAR_NODE_FILE", "a\na\nb\nb\n"),
    ],
)
def test_what_a_scheduler_gave_is_found(tmp_path: Path, variable: str, text: str) -> None:
    (tmp_path / "hosts").write_text(text)
    environment = {variable: str(tmp_path / "hosts")}
    assert listed(environment) == TWO
    assert [(h.name, h.slots) for h in hosts.find("c:3", None, None, environment).hosts] == [("c", 3)]
    (tmp_path / "hosts").unlink()
    with pytest.raises(UserError, match=rf"{variable} .*/hosts cannot be read \(No such file or directory\)"):
        listed(environment)


def test_a_scheduler_that_gave_too_little(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LSB_MCPU_HOSTS", "a 1 b 1")
    assert hosts.main(["--np", "2"]) == 0
    assert "HOSTS=a:1,b:1\nNAMES=a,b\nNODES=\nNODE_SLOTS=\nEACH=1\nRANKS=2\nHERE=\n" in capsys.readouterr().out
    assert hosts.main(["--np", "3"]) == 2
    error = "--np 3 is more than the 2 slots of a:1,b:1 (LSF gave no more: ask for bsub -n N, or say --hosts)"
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("ranks", [1, 4])
def test_one_host_takes_the_ranks_that_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """In a job on this machine alone, whose scheduler counts its cores or one task, --np says how many."""
    monkeypatch.setenv("LSB_MCPU_HOSTS", "localhost 2")
    assert hosts.main(["--np", str(ranks)]) == 0
    assert f"HOSTS=localhost:{ranks}\n" in capsys.readouterr().out
    assert hosts.main(["--hosts", "localhost:2", "--np", "4"]) == 2
    assert capsys.readouterr().err == "error: --np 4 is more than the 2 slots of localhost:2\n"


def test_no_hosts_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many ranks as this machine is for."""
    monkeypatch.setattr(node, "ranks_here", lambda: 5)
    assert listed({}, 3) == [("localhost", 3)]
    assert listed({}) == [("localhost", 5)]


def test_files_of_other_systems(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "hosts").write_text("a:2\r\nb:2\r\n", encoding=encoding)
        assert [(h.name, h.slots) for h in hosts.find(None, str(tmp_path / "hosts"), None, {}).hosts] == TWO
    (tmp_path / "hosts").write_text("a:2\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"--hostfile .*/hosts is not text in UTF-8: save it as such"):
        hosts.find(None, str(tmp_path / "hosts"), None, {})


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
SHELL = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("asked", "variables", "slots"),
    [
        ("--ntasks-per-node=4", {"SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4(x2)"}, [4, 4]),
        ("--ntasks=3", {"SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"}, [2, 1]),
        ("neither", {"SLURM_TASKS_PER_NODE": "16(x2)"}, [16, 16]),
        ("neither, and Slurm says nothing", {}, [1, 1]),
        ("--gpus-per-node=4", {"SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "1(x2)"}, [4, 4]),
        ("--gpus-per-node=a100:4", {"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_TASKS_PER_NODE": "16(x2)"}, [4, 4]),
        (
            "--gpus-per-task=1",
            {"SLURM_NTASKS": "8", "SLURM_GPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "4(x2)"},
            [4, 4],
        ),
        ("--gpus=8", {"SLURM_GPUS": "8", "SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "1(x2)"}, [4, 4]),
        ("salloc's own shell", {**SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_TASKS_PER_NODE": "8(x2)"}, [8, 8]),
    ],
)
def test_slurm_as_people_use_it(asked: str, variables: dict[str, str], slots: list[int]) -> None:
    assert listed({**JOB, **variables}) == list(zip(["n1", "n2"], slots, strict=True)), asked


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, [("n1", 1)]),
        ({"SLURM_NTASKS": "1", "SLURM_GPUS_ON_NODE": "8"}, [("n1", 8)]),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, [("n1", 4), ("n2", 4)]),
    ],
)
def test_a_shell_that_is_a_step_of_slurm(variables: dict[str, str], found: list[tuple[str, int]]) -> None:
    """srun --pty bash: the nodes of the step; its one task is the shell itself."""
    assert listed({**JOB, "SLURM_TASKS_PER_NODE": "1", **SHELL, **variables}) == found


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "Slurm job 7 does not name its nodes"),
        ({"SLURM_JOB_NODELIST": "n[1-"}, "SLURM_JOB_NODELIST is n[1-: these are no names of nodes"),
        ({"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "4"}, "Slurm job 7 has 2 nodes, and tasks for 1"),
        ({"SLURM_TASKS_PER_NODE": "many"}, "SLURM_TASKS_PER_NODE is many: these are no numbers of tasks"),
        ({"SLURM_HET_SIZE": "2"}, "Slurm job 7 has several parts"),
        ({"SLURM_GPUS": "a100:3", "SLURM_GPUS_ON_NODE": "2"}, "3 GPUs are not as many on each of 2 nodes: ask for"),
        (
            {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"},
            "8 GPUs on a node, and tasks for 1 of them: ask for --ntasks-per-node=8, or say --np N",
        ),
    ],
)
def test_what_slurm_does_not_say(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        listed({**JOB, **variables})


def test_fewer_ranks_than_gpus_on_demand() -> None:
    variables = {**JOB, "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}
    assert listed(variables, ranks=2) == [("n1", 1), ("n2", 1)]


def test_hosts_in_a_job_of_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the names that Slurm has for them; what is no node of the job is refused."""
    for variable, value in {**JOB, "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(hosts, "is_here", lambda name: name in ("localhost", "n1"))
    assert hosts.main(["--by-slurm", "--hosts", "localhost:4,n2.cluster:2"]) == 0
    assert "HOSTS=n1:4,n2:2\n" in capsys.readouterr().out
    assert hosts.main(["--by-slurm", "--hosts", "n2:3"]) == 0
    assert "NODES=n1,n2\nNODE_SLOTS=1,3\n" in capsys.readouterr().out, "mpirun must know of all"
    assert hosts.main(["--by-slurm", "--hosts", "n1:4,n3:2"]) == 2
    known = "host n3 is no node of Slurm job 7, which has n1, n2: name those, or leave --hosts out"
    assert capsys.readouterr().err == f"error: {known}\n"
    assert hosts.main(["--hosts", "n1:4,n3:2"]) == 0, "by ssh they may be any"
