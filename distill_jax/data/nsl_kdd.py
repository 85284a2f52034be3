"""NSL-KDD: network connections, normal or one of four kinds of attack, from its original files.

41 features of a connection (3 symbolic), the name of the attack and a difficulty, which is
dropped. The test file has attacks that the training file lacks. Tavallaee, Bagheri, Lu, Ghorbani:
A detailed analysis of the KDD CUP 99 data set, CISDA 2009; free for research with that citation,
from the Canadian Institute for Cybersecurity, University of New Brunswick.
"""

from pathlib import Path

from distill_jax.core.api import Dataset
from distill_jax.core.errors import ArgumentError, DataUnavailable, nearest
from distill_jax.data import _tables, source

TRAIN_FILES = {"KDDTrain+.txt": 125973, "KDDTrain+_20Percent.txt": 25192}
TEST_FILE, TEST_ROWS = "KDDTest+.txt", 22544
LAYOUT = (
    f"put {TEST_FILE} and one of {', '.join(TRAIN_FILES)} of the original NSL-KDD "
    "(www.unb.ca/cic/datasets/nsl.html) into one folder and name it with the argument path"
)
_NAMES = (
    "duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot "
    "num_failed_logins logged_in num_compromised root_shell su_attempted num_root "
    "num_file_creations num_shells num_access_files num_outbound_cmds is_host_login "
    "is_guest_login count srv_count serror_rate srv_serror_rate rerror_rate srv_rerror_rate "
    "same_srv_rate diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count "
    "dst_host_same_srv_rate dst_host_diff_srv_rate dst_host_same_src_port_rate "
    "dst_host_srv_diff_host_rate dst_host_serror_rate dst_host_srv_serror_rate "
    "dst_host_rerror_rate dst_host_srv_rerror_rate"
)
FEATURES = tuple(_NAMES.split())
SYMBOLIC = ("protocol_type", "service", "flag")
NUMERIC = tuple(name for name in FEATURES if name not in SYMBOLIC)
# Seconds, bytes and counts, all of them integers; for the binary ones among them the logarithm is
# undone by standardization.
LOG = tuple(j for j, name in enumerate(NUMERIC) if not name.endswith("_rate"))
# As the KDD Cup 1999 scored them (httptunnel is u2r, worm r2l).
ATTACKS = {
    "normal": "normal",
    "dos": "apache2 back land mailbomb neptune pod processtable smurf teardrop udpstorm",
    "probe": "ipsweep mscan nmap portsweep saint satan",
    "r2l": (
        "ftp_write guess_passwd imap multihop named phf sendmail snmpgetattack snmpguess spy "
        "warezclient warezmaster worm xlock xsnoop"
    ),
    "u2r": "buffer_overflow httptunnel loadmodule perl ps rootkit sqlattack xterm",
}
CLASSES = tuple(ATTACKS)
LABELS = {name: k for k, names in enumerate(ATTACKS.values()) for name in names.split()}


def make(*, path: str, train_file: str = "", held_out: float = 0.1, split_seed: int = 0) -> Dataset:
    """Reads the training and the test file; 5 classes, 3 categorical and 38 numeric columns.

    Times, bytes and counts enter as sign(x) log(1 + |x|). Ids, means and deviations are those of
    the training file. Where a file has another number of rows than the original, the name in the
    provenance includes the number of rows.

    Args:
      path: folder with the original files, which have no header.
      train_file: which of the two training files; by default the full one if it is there.
      held_out: share of the training file held out.
      split_seed: seed of that split.

    Raises:
      DataUnavailable: a file is missing, a line has not 43 columns, or an attack is unknown.
      ArgumentError: `train_file` is neither of the two.
    """
    if train_file and train_file not in TRAIN_FILES:
        raise ArgumentError(
            f"train_file is {train_file!r}",
            where="train_file",
            hint=nearest(train_file, TRAIN_FILES),
        )
    folder = source.existing(path, hint=LAYOUT)

    def find(names: list[str]) -> Path:
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise DataUnavailable(f"no {' or '.join(names)}", where=str(folder), hint=LAYOUT)

    def read(file: Path, rows: int) -> _tables.Raw:
        raw = _tables.read_raw(
            file,
            columns=(*FEATURES, "attack", "difficulty"),
            categorical=SYMBOLIC,
            numeric=NUMERIC,
            label="attack",
            labels=LABELS,
            name=f"NSL-KDD ({file.stem})",
            licence="research, with citation",
        )
        return _tables.count_in_name(raw, rows)

    train = find([train_file] if train_file else list(TRAIN_FILES))
    test = find([TEST_FILE])
    return _tables.make_dataset(
        read(train, TRAIN_FILES[train.name]),
        read(test, TEST_ROWS),
        log=LOG,
        classes=CLASSES,
        held_out=held_out,
        split_seed=split_seed,
    )
