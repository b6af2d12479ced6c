import datetime
import functools
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as papq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_jax.data.cleaning import clean
from rec_jax.data.interactions import InteractionLog, read_log


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def events(log):
    """Returns (user, item, time) tuples with the ids of the file, in row order."""
    times = [None] * log.num_events if log.times is None else log.times.tolist()
    users, items = log.user_ids[log.users].tolist(), log.item_ids[log.items].tolist()
    return list(zip(users, items, times, strict=True))


MOVIELENS = [("1", "1193", 978300760), ("1", "661", 978302109), ("2", "1193", 978298413)]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "name, content, chosen",
    [
        ("ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n", "movielens"),
        ("u.data", "1\t1193\t5\t978300760\n1\t661\t3\t978302109\n2\t1193\t4\t978298413\n", "movielens"),
        (
            "ratings.csv",
            "userId,movieId,rating,timestamp\n1,1193,5.0,978300760\n1,661,3.0,978302109\n2,1193,4.0,978298413\n",
            "movielens",
        ),
        (
            "ml.inter",
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            "1\t1193\t5\t978300760\n1\t661\t3\t978302109.0\n2\t1193\t4\t978298413\n",
            "recbole",
        ),
        (
            "log.csv",
            "rating,User_ID,item,timestamp\n5,1,1193,978300760\n3,1,661,978302109\n4,2,1193,978298413\n",
            "csv",
        ),
        (
            "log.tsv",
            "user\titem\trating\ttime\n1\t1193\t5\t978300760\n1\t661\t3\t978302109\n2\t1193\t4\t978298413\n",
            "csv",
        ),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("tail", ["", "\n\n"])
def test_every_format_with_times_gives_the_same_log(write, name, content, chosen, line_end, bom, tail):
    log = read_log(write(name, bom + (content + tail).replace("\n", line_end).encode()))
    assert events(log) == MOVIELENS
    assert log.ratings.tolist() == [5, 3, 4]
    assert f"read as {chosen}" in log.notes[0]
    assert ("2 blank lines skipped" in log.notes) == bool(tail)
    assert (log.users.dtype, log.items.dtype, log.times.dtype) == (np.int32, np.int32, np.int64)
    assert log.users.tolist() == [0, 0, 1] and log.items.tolist() == [1, 2, 1]
    assert log.item_ids.tolist() == ["", "1193", "661"]


def test_sasrec_and_sequences_agree(write):
    pairs = read_log(write("pairs.txt", "7 3\n7 1\n9 3\n9 2\n9 3\n"))
    sequences = read_log(write("sequences.txt", "7 3 1\n\n9 3 2 3 \n"))
    assert events(pairs) == events(sequences) == [(u, i, None) for u, i in ("73", "71", "93", "92", "93")]
    assert "read as sasrec" in pairs.notes[0] and "read as sequences" in sequences.notes[0]
    assert "no times: the order of the file is the order of events" in pairs.notes
    assert "1 blank line skipped" in sequences.notes
    assert pairs.times is None and pairs.ratings is None


def test_parquet_columns_of_several_types_are_read(tmp_path):
    times = [datetime.datetime(2020, 1, 1, 0, 0, s) for s in (1, 2, 3)]
    plain = pa.table({"u": ["a", "b", "b"], "i": [5, 6, 5], "t": times})
    odd = pa.table(
        {
            "u": pa.array(["a", "b", "b"]).dictionary_encode(),
            "i": [5.0, 6.0, 5.0],
            "t": pa.array(times, pa.timestamp("ms", "Europe/Paris")),
        }
    )
    for table in (plain, odd):
        papq.write_table(table, tmp_path / "log.parquet")
        log = read_log(tmp_path / "log.parquet", user="u", item="i", time="t")
        assert events(log) == [("a", "5", 1577836801), ("b", "6", 1577836802), ("b", "5", 1577836803)]
    papq.write_table(pa.table({"user": ["a"], "item": [1.5]}), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="row 1: item 1.5 is not a whole number"):
        read_log(tmp_path / "log.parquet")
    (tmp_path / "log.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_log(tmp_path / "log.parquet")


def test_tfds_without_tensorflow(monkeypatch, tmp_path):
    """TFDS prepares a data set and reads it; only the download is replaced."""
    import tensorflow_datasets as tfds

    folder = tmp_path / "ml-latest-small"
    folder.mkdir()
    (folder / "movies.csv").write_text("movieId,title,genres\n1193,Cuckoo,Drama\n")
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1193,5,978300760\n")
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url: tmp_path)
    place = dict(data_dir=tmp_path / "tfds", builder_kwargs={"file_format": "array_record"})
    monkeypatch.setattr(tfds, "data_source", functools.partial(tfds.data_source, **place))
    for _ in range(2):
        log = read_log("movielens/latest-small-ratings", format="tfds")
        assert events(log) == MOVIELENS[:1] and log.titles == {"1193": "Cuckoo"}
        shutil.rmtree(folder, ignore_errors=True)
    assert "tensorflow" not in sys.modules
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # not installed
    with pytest.raises(ValueError, match=r"TensorFlow to prepare.*pip install .rec_jax\[tensorflow\]"):
        read_log("movielens/100k-ratings", format="tfds")
    monkeypatch.delitem(sys.modules, "tensorflow")
    with pytest.raises(ValueError, match="TFDS cannot load it.*first use needs a network"):
        read_log("movielens/25m-ratings", format="tfds")
    with pytest.raises(ValueError, match="path='movielens/100k-movies' is not a MovieLens ratings data set"):
        read_log("movielens/100k-movies", format="tfds")


def test_quoted_fields_with_delimiters_and_line_ends(write):
    log = read_log(
        write("log.csv", 'user,item,note\na,"x,y","two\nlines"\nb,"say ""z""",one\n'), features=("note",)
    )
    assert events(log) == [("a", "x,y", None), ("b", 'say "z"', None)]
    assert log.features["note"].tolist() == ["two\nlines", "one"]
    broken = write("log.csv", 'user,item,note\na,"x,y","two\nlines"\nb,z\n')
    with pytest.raises(ValueError, match=r"line 4: 'b,z' has 2 fields, expected 3"):
        read_log(broken)


def test_features_are_numbers_or_text(write):
    log = read_log(
        write("log.csv", "user,item,price,shop\na,x,1.5,s\na,,9,t\nb,x,,\n"), features=("price", "shop")
    )
    np.testing.assert_array_equal(log.features["price"], [1.5, np.nan])
    assert log.features["shop"].tolist() == ["s", ""]


# ---------------------------------------------------------------- malformed files


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        (
            "a.txt",
            "1 2\n1 3\n\n1 4 5\n",
            {},
            r"a.txt, line 4: '1 4 5' has 3 fields, expected 2 \(user item\)",
        ),
        ("a.txt", "1 2\n1\n", {"format": "sasrec"}, r"line 2: '1' has 1 field, expected 2"),
        ("a.txt", "1\t2\n", {"format": "sasrec"}, r"line 1.*the line contains tabs: set delimiter='\\t'"),
        ("a.txt", "1 2\n1 -3\n", {}, "line 2: '1 -3': item '-3' is not a whole number from 0"),
        ("a.txt", "1 2\n99999999999999999999 3\n", {}, "line 2.*user '99999999999999999999' is not a whole"),
        ("a.txt", "1 2\n1 9223372036854775808\n", {}, "line 2.*9223372036854775808.*is not a whole"),
        ("a.txt", "1 2\n1 03\n", {}, "line 2.*leading zeros"),
        ("a.txt", "1 2\n1 x\n", {}, "line 2.*item 'x' is not a whole number"),
        ("a.txt", "1 2\n 3\n", {"format": "sasrec"}, "line 2: ' 3': user '' is not a whole number"),
        ("a.txt", "1 2 3\n2\n", {}, "line 2: '2': expected `user item item ...`"),
        ("a.txt", "1 2 3\n2\n", {"format": "sequences"}, "line 2: '2': expected `user item item ...`"),
        ("a.txt", "1 2 3\n2 x\n", {"format": "sequences"}, "line 2: '2 x' .item x.: item 'x' is not a whole"),
        ("a.txt", "1 2 3\n\n1 4\n", {"format": "sequences"}, "line 3: '1 4': user 1 already has line 1, but"),
        ("a.txt", "1 2 3\n1 2 4\n", {}, "line 1: .*cannot detect the format.*sasrec"),
        ("a.txt", "user|item\n", {}, "cannot detect the format"),
        (
            "a.dat",
            "1::2::3::978300760\n1::2::978300760\n",
            {},
            "line 2: '1::2::978300760' has 3 fields, expected 4",
        ),
        (
            "a.dat",
            "1::2::3::978300760\n1::2::3:5::978300760\n",
            {},
            "line 2: '1::2::3:5::978300760' has a single ':' inside",
        ),
        ("a.dat", "1::2::x::978300760\n", {}, "line 1.*rating 'x' is not a number"),
        ("a.dat", "1::-2::3::978300760\n", {}, "line 1.*item '-2'"),
        ("a.inter", "user_id\titem_id\n1\t2\n", {}, "column 'user_id' of the header has no type"),
        ("a.csv", "", {}, "a.csv is empty"),
        ("a.csv", "\n \r\n\n", {}, "a.csv is empty"),
        ("a.csv", 'user,item\n1,2\n1,"2\n3,4\n', {}, "line 3: .*a double quote opened in this line"),
        (
            "a.csv",
            'user,item\n1,"2\n3,"4\n',
            {},
            "item '2.n3,4' contains a line end: is a double quote missing",
        ),
        (
            "a.csv",
            "user,item\n1,2\n  \n",
            {},
            "line 3: '  ' has 1 field, expected 2 .user,item. separated by ','$",
        ),
        (
            "a.csv",
            "1,2\n3,4\n",
            {"user": "u"},
            "no column 'u': its first line looks like an event: add a header",
        ),
        ("a.csv", "user,item,time\n1,2,1969-12-31\n", {}, "line 2.*the time is not between 1970 and 2100$"),
        ("a.csv", "user,item\n", {}, "contains no events, only the header line 'user,item'"),
        ("a.csv", "user;item\n1;2\n", {}, "line 1: 'user;item'.*contains semicolons: set delimiter=';'"),
        ("a.csv", "user,item\n1,2\n1;2\n", {}, "line 3: '1;2' has 1 field, expected 2"),
        ("a.csv", "user,item\n1,2\n1,2,3\n", {}, "line 3: '1,2,3' has 3 fields, expected 2"),
        (
            "a.csv",
            "user,item,user\n1,2,3\n",
            {},
            "line 1: 'user,item,user': the header has two columns 'user'",
        ),
        ("a.csv", "who,item\n1,2\n", {}, "cannot find the user column: .* who, item"),
        (
            "a.csv",
            "user,item\n1,2\n",
            {"user": "usr"},
            "no column 'usr': set user to one of its columns, user, item .did you mean 'user'",
        ),
        ("a.csv", "user,uid,item\n1,2,3\n", {}, "the user column could be user or uid: set user"),
        ("a.csv", "user,item\n1,2\n", {"features": ("price",)}, "no column 'price': set features to one of"),
        ("a.csv", "user,item,time\n1,2,5\n1,2,soon\n", {}, "line 3.*time 'soon' is not a time like '5'"),
        (
            "a.csv",
            "user,item,time\n1,2,soon\n",
            {},
            "line 2.*time 'soon' is not a number or an ISO 8601 date",
        ),
        (
            "a.csv",
            "user,item,time\n1,2,2020-01-01\n1,2,2020-13-01\n",
            {},
            "line 3.*'2020-13-01' is not a time like",
        ),
        ("a.csv", "user,item,time\n1,2,-5\n", {}, "line 2.*the time -5 is not between 1970 and 2100"),
        ("a.csv", "user,item,time\n1,2,978300760000\n", {}, "line 2.*if it is in ms, set time_unit='ms'"),
        ("a.csv", "user,item,time\n1,2,1e300\n", {}, "line 2.*not between 1970 and 2100"),
        ("a.csv", "user,item,time\n1,2,99999999999999999999\n", {}, "line 2.*not between 1970 and 2100"),
        ("a.csv", "user,item,time\n1,2,2020-01-01\n", {"time_unit": "ms"}, "time_unit='ms' has no effect"),
        ("a.csv", "user,item,rating\n1,2,3\n1,2,inf\n", {}, "line 3.*the rating is infinite"),
        ("a.csv", "user,item\n,2\n1,\n", {}, "line 2: .* no row has values for all of user, item"),
        ("a.csv", b"user,item\n1,2\n\xe9,2\n", {}, "line 3.*not UTF-8.*iconv"),
        ("a.csv", b"\x1f\x8b\x08", {}, "gzip-compressed: decompress it first"),
        ("a.csv", "user,item\n1,2\n".encode("utf-16"), {}, "NUL bytes"),
        ("a.txt", "1 2\n", {"user": "u"}, "user='u' has no effect: the sasrec format has no header"),
        ("a.csv", "user,item\n1,2\n", {"delimiter": "--"}, "delimiter='--' must be one character"),
        ("a.csv", "user,item\n1,2\n", {"format": "cvs"}, "format='cvs' is not one of auto, sasrec"),
        ("a.csv", "user,item\n1,2\n", {"time_unit": "min"}, "time_unit='min' is not one of s, ms"),
    ],
)
def test_malformed_files_are_refused(write, name, content, options, message):
    with pytest.raises(ValueError, match=message):
        read_log(write(name, content), **options)


def test_the_line_of_an_error_in_a_later_block_is_exact(write):
    """Arrow parses in blocks of a megabyte, in parallel; the error is in the second block."""
    lines = [f"{row},{row}" for row in range(100_000)]
    lines[95_000] = "a,b,c"
    with pytest.raises(ValueError, match=r"line 95002: 'a,b,c' has 3 fields, expected 2"):
        read_log(write("log.csv", "user,item\n" + "\n".join(lines)))


# ---------------------------------------------------------------- rules that are counted


def test_missing_values_are_counted(write):
    content = "user,item,time,rating\na,x,5,1\n,x,6,1\nNA,x,6,1\na,NaN,7,1\na,y,,1\na,z,8,null\n,,,\n"
    log = read_log(write("log.csv", content))
    assert events(log) == [("a", "x", 5), ("a", "z", 8)]
    np.testing.assert_array_equal(log.ratings, np.float32([1, np.nan]))
    for note in (
        "3 rows without a user left out",
        "1 row without an item left out",
        "1 row without a time left out",
        "1 event without a rating kept",
    ):
        assert note in log.notes
    assert log.item_ids.tolist() == ["", "x", "z"]  # y lost its only event


def test_unusual_ids_are_noted(write):
    log = read_log(write("log.csv", "user,item\n a,-1\na ,5\na,5\n"))
    assert events(log) == [("a", "-1", None), ("a", "5", None), ("a", "5", None)]
    assert "2 user ids had blanks at the start or end: removed" in log.notes
    assert "1 item id negative or above 2^63 - 1 (-1): kept as text" in log.notes


@pytest.mark.parametrize(
    "unit, values, seconds",
    [
        ("s", ["10", "20", "30"], [10, 20, 30]),
        ("s", ["10.0", "2e1", "30"], [10, 20, 30]),
        ("ms", ["10000", "20000", "30000"], [10, 20, 30]),
        ("s", ["1970-01-01 00:00:10", "1970-01-01T00:00:20", "1970-01-01 00:00:30"], [10, 20, 30]),
        ("s", ["1970-01-01T00:00:10Z", "1970-01-01T02:00:20+02:00", "1970-01-01T00:00:30Z"], [10, 20, 30]),
        ("s", ["1970-01-02", "1970-01-03", "1970-01-04"], [86400, 172800, 259200]),
    ],
)
def test_times_become_seconds(write, unit, values, seconds):
    content = "user,item,time\n" + "".join(f"a,x,{value}\n" for value in values)
    assert read_log(write("log.csv", content), time_unit=unit).times.tolist() == seconds


def test_fractions_of_a_second_order_the_rows(write):
    log = read_log(write("log.csv", "user,item,time\na,x,5.9\na,y,5.1\n,v,5\na,z,5.9\na,w,1\n"))
    assert events(log) == [("a", "w", 1), ("a", "y", 5), ("a", "x", 5), ("a", "z", 5)]
    assert "3 times had fractions of a second: used to order the rows, then dropped" in log.notes


def test_a_note_says_that_times_without_a_zone_are_read_as_utc(write):
    log = read_log(write("log.csv", "user,item,time\na,x,2020-01-01\n"))
    assert "times have no time zone: read as UTC" in log.notes
    assert "times from 2020-01-01 to 2020-01-01 (UTC)" in log.notes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=30))
def test_a_csv_file_gives_the_events_that_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("user,item,time\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    log = read_log(path)
    assert events(log) == [(f"u{u}", f"i{i}", t) for u, i, t in rows]
    assert len(log.user_ids) == len({u for u, _, _ in rows})


# ---------------------------------------------------------------- cleaning


def make_log(rows, times=None, ratings=None):
    """rows: two-letter strings, the user and the item."""
    users, user_codes = np.unique([row[0] for row in rows], return_inverse=True)
    items, item_codes = np.unique([row[1] for row in rows], return_inverse=True)
    return InteractionLog(
        user_codes.astype(np.int32),
        item_codes.astype(np.int32) + 1,
        None if times is None else np.array(times),
        None if ratings is None else np.array(ratings, np.float32),
        users.astype(object),
        np.array(["", *items], object),
    )


def pairs(log):
    return [user + item for user, item, _ in events(log)]


def test_clean_keeps_everything_by_default():
    log = make_log(["ax", "ax", "by"])
    cleaned, report = clean(log)
    assert cleaned is log
    assert report == [
        ("as read", 2, 2, 3, 0),
        ("duplicates=keep (1 repeat)", 2, 2, 3, 0),
    ]


@pytest.mark.parametrize("duplicates, kept", [("first", ["ay", "ax", "bx"]), ("last", ["bx", "ax", "ay"])])
def test_duplicates_are_first_or_last_in_time_not_in_the_file(duplicates, kept):
    # In time: ay(1) ax(2) bx(3, row 2) bx(3, row 3) ax(4) ay(5); rows are in another order.
    log = make_log(["ay", "ax", "bx", "bx", "ax", "ay"], times=[1, 2, 3, 3, 4, 5])
    cleaned, report = clean(log, duplicates=duplicates)
    assert pairs(cleaned) == kept
    assert report[-1] == (f"duplicates={duplicates}", 2, 2, 3, 3)
    shuffled = make_log(["ax", "ay", "ay", "bx", "ax", "bx"], times=[4, 1, 5, 3, 2, 3])
    cleaned, _ = clean(shuffled, duplicates=duplicates)
    expected = {"first": [1, 3, 2], "last": [4, 5, 3]}[duplicates]
    assert cleaned.times.tolist() == expected


def test_minimum_rating_also_removes_missing_ratings():
    log = make_log(["ax", "ay", "az"], ratings=[4, 2, np.nan])
    assert pairs(clean(log, min_rating=4)[0]) == ["ax"]
    with pytest.raises(ValueError, match="min_rating=4 needs ratings"):
        clean(make_log(["ax"]), min_rating=4)


def test_minimum_counts_apply_once_and_k_core_until_stable():
    # Item z has one event; without it c has one event; without c, y has one event.
    log = make_log(["ax", "aw", "bx", "bw", "by", "cy", "cz"])
    once, report = clean(log, min_item_events=2, min_user_events=2)
    assert pairs(once) == ["ax", "aw", "bx", "bw", "by"]
    assert [row[0] for row in report[2:]] == ["min_item_events=2", "min_user_events=2"]
    assert [row[1:] for row in report[2:]] == [(3, 3, 6, 1), (2, 3, 5, 1)]
    core, report = clean(log, k_core=2)
    assert pairs(core) == ["ax", "aw", "bx", "bw"]
    assert report[-1] == ("k_core=2", 2, 2, 4, 3)
    assert core.item_ids.tolist() == ["", "w", "x"] and core.user_ids.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="k_core=3 removes all 7 events"):
        clean(log, k_core=3)


def test_clean_selects_every_column():
    log = make_log(["ax", "by", "ax"], times=[3, 2, 1], ratings=[1, 2, 3])
    cleaned, _ = clean(log, min_user_events=2)
    assert pairs(cleaned) == ["ax", "ax"]
    assert cleaned.times.tolist() == [3, 1] and cleaned.ratings.tolist() == [1, 3]


def test_an_unknown_duplicates_rule_is_refused():
    with pytest.raises(ValueError, match="duplicates='all' is not one of keep, first, last"):
        clean(make_log(["ax"]), duplicates="all")


# ---------------------------------------------------------------- real data


def test_real_files_have_their_known_counts(real_data):
    sasrec = read_log(real_data / "ml-1m" / "ml-1m.txt")
    assert (sasrec.num_events, len(sasrec.user_ids), len(sasrec.item_ids) - 1) == (999_611, 6040, 3416)
    plain = np.loadtxt(real_data / "ml-1m" / "ml-1m.txt", dtype=np.int64, max_rows=20_000)
    assert sasrec.item_ids[sasrec.items[:20_000]].astype(np.int64).tolist() == plain[:, 1].tolist()
    assert sasrec.user_ids[sasrec.users[:20_000]].astype(np.int64).tolist() == plain[:, 0].tolist()
    beauty = read_log(real_data / "beauty" / "Beauty.txt")
    assert (beauty.num_events, len(beauty.user_ids), len(beauty.item_ids) - 1) == (198_502, 22_363, 12_101)
    recbole = read_log(real_data / "ml-100k" / "ml-100k.inter")
    assert recbole.num_events == 100_000
    assert events(recbole)[0] == ("196", "242", 881250949)
