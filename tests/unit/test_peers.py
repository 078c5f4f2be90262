"""Which rank keeps the others waiting, by what the ranks say of themselves."""

import json
import sys
import threading
import time
from dataclasses import asdict

import pytest

from reinforcer_tp.lifecycle import peers
from reinforcer_tp.lifecycle.beats import Beat, describe_all, describe_frame, find_lost
from reinforcer_tp.lifecycle.ending import Ending, Failure
from reinforcer_tp.lifecycle.position import Position


def beat(step=5, phase="compute", *, waits=True, **others) -> Beat:
    fixed = {"number": 1, "ticks": 9, "where": "", "pid": 1, "start": 1}
    return Beat(step=step, phase=phase, waits=waits, **{**fixed, "machine": "m", **others})


@pytest.mark.parametrize(
    ("beats", "stopped", "lost"),
    [
        ([beat(), beat()], {1}, (1,)),
        ([beat(), beat(next_rank=2, next_silent_s=3.5), beat()], set(), (2,)),
        ([beat(), beat(next_rank=2, next_silent_s=0.5), beat(waits=False)], set(), (2,)),
        ([beat(), beat(4, "optimizer", waits=False), beat()], set(), (1,)),
        # with a GPU nobody is seen to wait: only who is behind can be named
        ([beat(waits=None), beat(waits=None), beat(phase="step", waits=None)], set(), (2,)),
        ([beat(waits=None), beat(waits=None)], set(), ()),
        ([beat(waits=None), beat(phase="step", waits=None)], set(), (1,)),
        # all wait: who is ahead has left out a collective; one that is alone behind made one more
        ([beat(), beat(phase="optimizer"), beat()], set(), (1,)),
        ([beat(phase="optimizer"), beat(), beat(phase="optimizer")], set(), (1,)),
        ([beat(), beat(6, "step")], set(), (1,)),
        ([beat(), beat()], set(), ()),
        ([beat(), beat(), beat(4, is_done=True)], set(), ()),
    ],
)
def test_the_lost_rank_is_found(beats, stopped, lost):
    found, why = find_lost(dict(enumerate(beats)), stopped, silent_s=3.0)
    assert found == lost and bool(why) == bool(lost)


def test_what_is_told_survives_the_store():
    failure = Failure(code=75, cause="lost", message="m", machine="x", culprits=(1, 3))
    assert Failure.from_json(failure.to_json()) == failure
    assert Beat(**json.loads(json.dumps(asdict(beat())))) == beat()


def test_a_frame_in_a_collective_waits():
    """The innermost frame of ours is named; what it called decides."""
    import torch.distributed as dist

    from reinforcer_tp.mcore.topology import check_same_everywhere

    begun, let_go, found = threading.Event(), threading.Event(), []

    class Slow:
        def __reduce__(self):  # pickled inside all_gather_object
            begun.set()
            let_go.wait(30)
            return dict, ()

    def run():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        check_same_everywhere({"a": Slow()})

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(30)
        found = describe_frame(sys._current_frames()[thread.ident])
    finally:
        let_go.set()
        thread.join()
        dist.destroy_process_group()
    assert found[1] and found[0].startswith("reinforcer_tp/mcore/topology.py:")
    assert found[0].endswith("in check_same_everywhere")
    assert describe_frame(sys._getframe()) == ("no frame of ours", False)


def test_where_all_ranks_are_in_one_line():
    beats = {rank: beat() for rank in range(6)} | {4: beat(7, "save")}
    text = describe_all(beats)
    assert text.startswith("1 ranks from 4: last step 7, phase save")
    assert "5 ranks from 0: last step 5, phase compute" in text


def test_a_rank_says_goodbye_also_while_a_beat_is_on_its_way(monkeypatch):
    """Else the others wait for it, or take it for dead."""
    begun, let_go = threading.Event(), threading.Event()

    class Slow(dict):
        def set(self, key, value):
            begun.set()
            assert let_go.wait(30)
            self[key] = value

        def check(self, keys):
            return all(key in self for key in keys)

    store = Slow()
    monkeypatch.setattr(peers, "_connect", lambda: store)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    watch = peers.Peers(Ending(Position()), world_size=2, timeout_s=60)
    watch.start()
    assert begun.wait(30)
    closing = threading.Thread(target=watch.close)
    closing.start()
    while not watch._is_done:
        time.sleep(0.01)
    let_go.set()
    closing.join(30)
    assert json.loads(store["beat0"])["is_done"]
