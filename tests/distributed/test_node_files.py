"""A file cut into pieces and put together again, a few pieces at a time."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from nemo_rl_lora.distributed import node_files
from nemo_rl_lora.distributed.node_files import BroughtFiles, bring, node_id, num_pieces, piece_of, sees, write_piece


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 5500])
def test_pieces_make_the_file(tmp_path, monkeypatch, num_bytes):
    monkeypatch.setattr(node_files, "PIECE_BYTES", 1000)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(np.random.default_rng(0).bytes(num_bytes))
    target.write_text("what was there before")
    under_way, most = set(), 0

    def send(number):
        nonlocal most
        under_way.add(number)
        most = max(most, len(under_way))
        return piece_of(source, number)

    def take(number, piece):
        under_way.remove(number)
        write_piece(target, number, piece)

    bring(num_pieces(source.stat().st_size), send, take)
    if num_bytes:
        assert target.read_bytes() == source.read_bytes()
    assert most <= 2


def test_readers_of_a_file_keep_it_when_another_takes_its_place(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with path.open("rb") as reader:
        write_piece(path, 0, np.frombuffer(b"after", dtype=np.uint8))
        assert reader.read() == b"before"
    assert path.read_bytes() == b"after"


def test_a_path_that_is_not_there_is_waited_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(node_files, "_SEEN_SECONDS", 0.3)
    assert sees(tmp_path)
    assert not sees(tmp_path / "none")


def test_a_file_travels_once_to_a_node_however_many_ask_and_again_when_it_was_written_anew(tmp_path, monkeypatch):
    from nemo_rl_lora.distributed.ray_runtime import running_ray

    monkeypatch.setattr(node_files, "PIECE_BYTES", 1000)
    source, sent = tmp_path / "adapter" / "weights", []
    source.parent.mkdir()
    source.write_bytes(b"a" * 2500)

    def sending(path, number):
        sent.append(number)
        return piece_of(path, number)

    monkeypatch.setattr(node_files, "piece_of", sending)
    with running_ray():
        files, node = BroughtFiles(), node_id()
        try:
            with ThreadPoolExecutor(4) as pool:
                there = set(pool.map(lambda _: files.path_on(node, source, 60.0), range(8)))
            assert len(there) == 1
            assert sent == [0, 1, 2]
            path = Path(there.pop())
            assert path != source
            assert path.read_bytes() == source.read_bytes()
            source.write_bytes(b"b" * 500)
            assert files.path_on(node, source, 60.0) == str(path)
            assert path.read_bytes() == source.read_bytes()
            files.drop(source, 60.0)
            assert not path.exists()
            assert files.path_on(node, source, 60.0) == str(path)
            holder = files._holders[node]
            ray.kill(holder)
            with suppress(RayActorError):
                while True:  # it is gone in a moment
                    with suppress(RayTaskError):
                        ray.get(holder.drop.remote(str(tmp_path / "none")))
            files.drop(source, 60.0)  # nothing is left of what a process held that is gone
            assert files.path_on(node, source, 60.0) != str(path)
        finally:
            files.close()
