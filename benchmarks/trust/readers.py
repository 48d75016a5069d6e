"""Every reader of a user's file or text, with valid inputs to mutate."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from benchmarks.trust import mutate
from benchmarks.trust.media_readers import captions, coloured, pictures, stills, video, wrong_names
from benchmarks.trust.mutate import place
from benchmarks.trust.reading import Bench, Damage, Reading, json_lines
from dpo_video.data.video_writer import gif_bytes
from dpo_video.errors import UserError
from tests.small_animatediff import SHAPE, load_small


def run_toml(bench: Bench) -> Reading:
    from dpo_video.workflows import config

    path = bench.folder / "run.toml"

    def read(data: bytes) -> object:
        place(path, data)
        return config.resolve(file=path).toml()

    texts = [
        config.resolve().toml(),
        config.resolve(choices={"pairs": "dense", "loss": "segment", "labeler": "metric"}).toml(),
        config.resolve(choices={"pairs": "store/", "backbone": "wan"}).toml(),
    ]
    return Reading(seeds=[text.encode() for text in texts], damage=mutate.damage_toml, read=read)


def assignments(bench: Bench) -> Reading:
    from dpo_video.workflows import config

    def read(data: bytes) -> object:
        text = data.decode("utf-8", "surrogateescape")
        return config.resolve(assignments=[text]).toml()

    def draw(random: Random, data: bytes, others: list[bytes]) -> bytes:
        return mutate.assignment(random).encode("utf-8", "surrogateescape")

    return Reading(seeds=[b"loss.beta=500"], damage=_surrogates(draw), read=read, file=False)


def _surrogates(draw: Damage) -> Damage:
    def safe(random: Random, data: bytes, others: list[bytes]) -> bytes:
        try:
            return draw(random, data, others)
        except UnicodeEncodeError:  # \ud800 cannot be a process argument
            return b"loss.beta=\xed\xa0\x80"

    return safe


def command_line(bench: Bench) -> Reading:
    """The same texts through the command line, for its exit code."""
    import contextlib
    import sys

    from dpo_video.cli import main

    def read(data: bytes) -> object:
        text = data.decode("utf-8", "surrogateescape").replace("\x00", "")
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
        sys.argv = ["dpo-video", "config", "--set", text]
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                main()
        except SystemExit as stop:
            assert stop.code in (None, 0, 2), f"exit code {stop.code}"
        return None

    inner = assignments(bench)
    return Reading(seeds=inner.seeds, damage=inner.damage, read=read, file=False)


def store_file(name: str, damage: Damage) -> Callable[[Bench], Reading]:
    """A file of the pair store; then the complete store is read."""

    def make(bench: Bench) -> Reading:
        from dpo_video.data.store import PairStore

        path = next(bench.store.folder.glob(name))
        original = path.read_bytes()
        rows = (bench.store.folder / "pairs.jsonl").read_bytes()

        def read(data: bytes) -> object:
            (bench.store.folder / "pairs.jsonl").write_bytes(rows)
            place(path, data)
            try:
                store = PairStore(bench.store.folder)
                store.check_fits(bench.model)
                for index in store.decided():
                    store.batch([index])
                return store.batch(range(len(store))) if len(store) else None
            finally:
                place(path, original)

        return Reading(seeds=[original], damage=damage, read=read)

    return make


def packed_file(name: str, damage: Damage, elsewhere: bool = False) -> Callable[[Bench], Reading]:
    """A file of a packed copy of the store, in a folder or at a URL."""

    def make(bench: Bench) -> Reading:
        import fsspec

        from dpo_video.data import storage
        from dpo_video.data.pack import pack
        from dpo_video.data.store import PairStore
        from dpo_video.support import urls

        urls.PROTOCOLS = (*urls.PROTOCOLS, "memory")
        storage.PAUSES = ()  # retrying does not repair damage
        folder = bench.folder / "packed"
        list(pack(bench.store, folder, 1))  # a shard a pair
        path = next(folder.glob(name))
        location: Path | str = folder
        put: Callable[[bytes], object] = partial(place, path)
        if elsewhere:
            files = fsspec.filesystem("memory")
            files.put(str(folder), "/fuzzed", recursive=True)
            location = "memory://fuzzed"
            target = f"/fuzzed/{path.relative_to(folder).as_posix()}"

            def put(data: bytes) -> object:
                return files.pipe_file(target, data)

        original = path.read_bytes()

        def read(data: bytes) -> object:
            put(data)
            try:
                store = PairStore(location)
                store.check_fits(bench.model)
                for index in store.decided():
                    store.batch([index])
                return store.batch(range(len(store))) if len(store) else None
            finally:
                put(original)

        return Reading(seeds=[original], damage=damage, read=read, file=not elsewhere)

    return make


def pairs_url(bench: Bench) -> Reading:
    """The URL in --pairs."""
    import fsspec

    from dpo_video.data import storage
    from dpo_video.data.pack import pack
    from dpo_video.data.store import PairStore
    from dpo_video.support import urls

    urls.PROTOCOLS = (*urls.PROTOCOLS, "memory")
    storage.PAUSES = ()
    list(pack(bench.store, bench.folder / "packed"))
    fsspec.filesystem("memory").put(str(bench.folder / "packed"), "/fuzzed", recursive=True)

    def read(data: bytes) -> object:
        store = PairStore(data.decode("utf-8", "surrogateescape"))
        return store.batch([0])

    def draw(random: Random, data: bytes, others: list[bytes]) -> bytes:
        scheme, _, rest = data.partition(b"://")  # another protocol might open a connection
        return (
            scheme + b"://" + mutate.damage(random, rest, [o.partition(b"://")[2] for o in others])
        )

    seeds = [b"memory://fuzzed", b"memory:///fuzzed/", b"nonsense://fuzzed", b"file:///nowhere"]
    return Reading(seeds=seeds, damage=draw, read=read, file=False)


def label_file(suffix: str, damage: Damage) -> Callable[[Bench], Reading]:
    """A label set: its recipe or its lines."""

    def make(bench: Bench) -> Reading:
        from dpo_video.data.label import recipe
        from dpo_video.data.labels import LabelSet, open_label_sets, preferences

        folder = bench.store.folder
        made = recipe(bench.store, bench.model, {"name": "recorded"}, 0.25)
        label_set = LabelSet.open_or_create(folder, "fuzzed", made)
        for pair, mark in enumerate((1.0, "skip", -0.5)):
            label_set.record(pair, [mark] * len(made.segments), rater="ann", note="why")
        label_set.record(0, [None] * len(made.segments), rater="bob")
        path = label_set.path.with_suffix(suffix)
        original = path.read_bytes()

        def read(data: bytes) -> object:
            place(path, data)
            try:
                label_sets = open_label_sets(folder, ["fuzzed"])
                assert label_sets[0].pinned
                return preferences(label_sets, bench.model.latent_shape[1])
            finally:
                place(path, original)

        return Reading(seeds=[original], damage=damage, read=read)

    return make


def recorded(bench: Bench) -> Reading:
    from dpo_video.data.label import StoreTask, recipe
    from dpo_video.data.labels import LabelSet
    from dpo_video.labeler.recorded import Recorded

    path = bench.folder / "recorded.jsonl"
    made = recipe(bench.store, bench.model, {"name": "recorded"}, 0.25)

    def read(data: bytes) -> object:
        place(path, data)
        label_set = LabelSet.open_or_create(bench.store.folder, "copied", made)
        try:
            labeler = Recorded(file=str(path))
            labeler.label_store(StoreTask(bench.store, bench.model, label_set, labeler))
        finally:
            label_set.path.unlink(missing_ok=True)
        return None

    lines = [
        {"pair": 0, "labels": ["first", "tie"]},
        {"pair": 1, "label": -1, "rater": "ann", "note": "it tears"},
        {"prompt": "a square 2", "label": "second"},
    ]
    return Reading(seeds=[json_lines(lines)], damage=mutate.damage_lines, read=read)


def folder_lines(bench: Bench) -> Reading:
    from dpo_video.pairs._formats import list_pairs

    root = bench.folder / "mine"
    root.mkdir(exist_ok=True)
    for name, part in (("a", bench.video), ("b", 1 - bench.video)):
        (root / f"{name}.gif").write_bytes(gif_bytes(part, SHAPE.fps))
    Image.new("L", (16, 16), 255).save(root / "mask.png")
    path = root / "pairs.jsonl"

    def read(data: bytes) -> object:
        place(path, data)
        listing = list_pairs(path, bench.model, "a prompt", 0.25)
        listing.fingerprint(SHAPE)
        return list(listing.read(bench.model))

    lines = [
        {"win": "a.gif", "lose": "b.gif", "prompt": "a dog runs"},
        {"win": "b.gif", "lose": "a.gif", "mask": "mask.png", "labels": [1, 0]},
    ]
    return Reading(seeds=[json_lines(lines)], damage=mutate.damage_lines, read=read)


def videodpo_pair(bench: Bench) -> Reading:
    from dpo_video.pairs._formats import list_pairs

    root = bench.folder / "videodpo"
    root.mkdir(exist_ok=True)
    path = root / "pair_00000.pt"
    first, second = torch.randn(2, *bench.model.latent_shape)
    prompt = bench.model.encode_prompts(["a square"])["prompt_embeds"]
    tensors = {"latents_w": first, "latents_l": second, "prompt_embeds": prompt}
    seeds = []
    for zipped, odd in [
        (True, first),
        (False, first),
        *((True, odd) for odd in _odd(first.clone())),
    ]:
        file = io.BytesIO()
        torch.save({**tensors, "latents_w": odd}, file, _use_new_zipfile_serialization=zipped)
        seeds.append(file.getvalue())

    def read(data: bytes) -> object:
        place(path, data)
        return list(list_pairs(root, bench.model, "a prompt", 0.25).read(bench.model))

    return Reading(seeds=seeds, damage=_zipped_or_not, read=read)


def _odd(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that a file may hold and that cannot be computed with."""
    return [
        tensor.to("meta"), tensor.to_sparse(), tensor.reshape(-1, 4).to_sparse_csr(),
        torch.nested.nested_tensor([tensor, tensor]), tensor.to(torch.float8_e4m3fn),
        tensor.to(torch.complex64), torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        tensor > 0, torch.nn.Parameter(tensor), torch.zeros(()).expand(1 << 20, 4, 4, 4),
        torch.zeros(1).expand(tensor.shape), tensor.flip(0)[::2], tensor[:0],
        torch.view_as_complex(tensor.clone().reshape(-1, 2)).conj(),
        torch.full_like(tensor, torch.nan),
    ]  # fmt: skip


def _zipped_or_not(random: Random, data: bytes, others: list[bytes]) -> bytes:
    if data.startswith(b"PK"):
        return mutate.damage_torch(random, data, others)
    return mutate.damage(random, data, others)


def checkpoint(name: str, damage: Damage) -> Callable[[Bench], Reading]:
    """A file of a run's checkpoint; the run is then resumed."""

    def make(bench: Bench) -> Reading:
        from accelerate import Accelerator

        from dpo_video.loss.global_ import Global
        from dpo_video.reference.toggle import Toggle
        from dpo_video.settings import TrainSettings
        from dpo_video.training.checkpoint import (
            RunFingerprint,
            check_unchanged,
            newest_checkpoint,
            restore,
        )
        from dpo_video.training.lora import adapt
        from dpo_video.training.run import train

        settings = TrainSettings(
            steps=1,
            gradient_accumulation_steps=1,
            rank=2,
            alpha=4,
            validation_videos=0,
            report_to="none",
        )
        out = bench.folder / "run"
        model = load_small(bench.checkpoint)

        bare = model.denoiser
        if not (out / "checkpoints").exists():
            list(
                train(
                    model, bench.store, Global(), Toggle(), settings, seed=0, out=out,
                    accelerator=Accelerator(cpu=True),
                )
            )  # fmt: skip
            _bare(model, bare)
        policy = adapt(model, settings, 0)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        path = next(out.rglob(name))
        original = path.read_bytes()
        fingerprint = RunFingerprint.of(model, bench.store, policy, "no")

        def read(data: bytes) -> object:
            place(path, data)
            try:
                if len(data) % 2 and path.suffix == ".safetensors":
                    _read_state(path)
                checkpoint = newest_checkpoint(out)
                check_unchanged(checkpoint, fingerprint)
                at = restore(checkpoint, policy, optimizer, None)
                assert at.step >= 0, f"resumes from step {at.step}"
                # An accepted checkpoint must train.
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                optimizer.step()
                return torch.randn(1), random.random()
            finally:
                place(path, original)

        return Reading(seeds=[original], damage=damage, read=read)

    return make


def _read_state(path: Path) -> None:
    """The reader behind the checksums of the manifest, which refuse damaged files first."""
    from dpo_video.support.tensor_tree import load_state

    try:
        load_state(path)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(str(error)) from error


def _bare(model: Any, network: Any) -> None:
    """Remove the adapter, so that one model serves all cases."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.base_layer)
    network.requires_grad_(False)
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        vars(network).pop(leftover, None)
    model.denoiser = network


def adapter(name: str, damage: Damage) -> Callable[[Bench], Reading]:
    """A file of an adapter's folder, as `evaluate` and `generate` load it."""

    def make(bench: Bench) -> Reading:
        from dpo_video.evaluation.adapter import put_on

        checkpoint("state.safetensors", mutate.damage)(bench)  # trains the run
        folder = next((bench.folder / "run").rglob("adapter"))
        (folder.parent / "checkpoint.json").unlink(missing_ok=True)  # as in a copied adapter
        path = folder / name
        original = path.read_bytes()
        model = load_small(bench.checkpoint)
        bare = model.denoiser

        def read(data: bytes) -> object:
            place(path, data)
            try:
                put_on(model, folder)
            finally:
                _bare(model, bare)
                place(path, original)
            return None

        return Reading(seeds=[original], damage=damage, read=read)

    return make


def log(bench: Bench) -> Reading:
    from dpo_video.training.diagnosis import judge_training
    from dpo_video.training.run_dir import read_log

    checkpoint("state.safetensors", mutate.damage)(bench)
    path = bench.folder / "run" / "log.jsonl"
    line = path.read_bytes()

    def read(data: bytes) -> object:
        place(path, data)
        try:
            reports = read_log(path.parent)
            return judge_training(reports) if reports else None
        finally:
            place(path, line)

    return Reading(seeds=[line * 3], damage=mutate.damage_lines, read=read)


def run_prompts(bench: Bench) -> Reading:
    from dpo_video.workflows.runs import PROMPTS, Run

    def read(data: bytes) -> object:
        place(bench.folder / PROMPTS, data)
        return Run(folder=bench.folder).prompts

    return Reading(seeds=[b'["a square", "a circle"]', b"[]"], damage=mutate.damage_json, read=read)


def prompts(suffix: str, seed: str, damage: Damage) -> Callable[[Bench], Reading]:
    def reading(bench: Bench) -> Reading:
        from dpo_video.workflows import session
        from dpo_video.workflows.config import resolve

        path = bench.folder / f"prompts{suffix}"
        config = resolve(flags={"evaluate.prompts": str(path)})

        def read(data: bytes) -> object:
            place(path, data)
            return session.evaluation_prompts(config)

        return Reading(seeds=[seed.encode()], damage=damage, read=read)

    return reading


def drawn_videos(bench: Bench) -> Reading:
    """The record of a folder of drawn videos."""
    from dpo_video.data.video_folder import VideoFolder

    root = bench.folder / "drawn"
    root.mkdir(exist_ok=True)

    def read(data: bytes) -> object:
        place(root / "metadata.jsonl", data)
        return VideoFolder(root).has("0.mp4", "0123")

    lines = [{"file_name": f"{i}.mp4", "text": "a", "seed": i, "drawn": "0123"} for i in range(3)]
    return Reading(seeds=[json_lines(lines)], damage=mutate.damage_lines, read=read)


def entries(bench: Bench) -> Reading:
    """The entries of `compare`, up to the configuration of each."""
    from dpo_video.workflows import entries

    path = bench.folder / "entries.toml"
    text = (
        "[selection]\nprompts = 16\nseeds = [0]\n\n[one]\npairs = 'local'\nloss = 'region'\n"
        "set = ['train.learning_rate=1e-4', 'train.steps=3']\nseeds = [0, 1]\n\n[two]\n"
        "pairs = 'dense'\nloss = 'segment'\nlabeler = 'metric'\nbackbone = 'tiny'\n"
    )

    def read(data: bytes) -> object:
        place(path, data)
        found = entries.read_entries([path])
        return [(each.seeds, each.resolve({"run.seed": 1}).toml()) for each in found.entries]

    return Reading(seeds=[text.encode()], damage=mutate.damage_toml, read=read)


def answers(bench: Bench) -> Reading:
    """Answers of a vision-language model, new and cached, and the note that keeps their reason."""
    from dpo_video.data.label import recipe
    from dpo_video.data.labels import LabelSet
    from dpo_video.labeler import _chat, vlm

    made = recipe(bench.store, bench.model, {"name": "vlm"}, 0.25)
    label_set = LabelSet.open_or_create(bench.store.folder, "answers", made)
    path = bench.folder / "answer.json"

    def read(data: bytes) -> object:
        place(path, data)
        text = _chat._cached(path)
        if text is None:
            text = data.decode("utf-8", "surrogatepass" if len(data) % 2 else "replace")
        try:
            verdict = vlm._read(text)
        except (_chat.FailedError, UnicodeDecodeError) as error:
            raise UserError(f"the answer is asked for again: {error}") from error
        label_set.record(0, [1.0] * len(made.segments), note=verdict.reason)
        label_set.path.unlink()
        return None

    seeds = [b'{"better": "first", "reason": "sharper \xe2\x80\xa8"}',
             b'Well: {"better": "tie"} ok', rb'{"answer": "{\"better\": \"second\"}"}',
             rb'{"better": "second", "reason": "\ud83d"}']  # fmt: skip
    return Reading(seeds=seeds, damage=_decodable, read=read)


def _decodable(random: Random, data: bytes, others: list[bytes]) -> bytes:
    damaged = mutate.damage_json(random, data, others) if data.startswith(b"{") else (
        mutate.damage(random, data, others))  # fmt: skip
    return damaged.decode("utf-8", "replace").encode("utf-8", "surrogatepass")


def model_config(bench: Bench) -> Reading:
    """config.json of a checkpoint."""
    from dpo_video.diffusion.pretrained import Checkpoint

    folder = bench.folder / "model" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    original = (bench.checkpoint / "vae" / "config.json").read_bytes()

    def read(data: bytes) -> object:
        place(folder / "config.json", data)
        return Checkpoint(source=str(folder.parent)).config("vae")

    return Reading(seeds=[original], damage=mutate.damage_json, read=read)


def model_names(bench: Bench) -> Reading:
    """Texts for backbone.model that name no folder."""
    from dpo_video.diffusion.pretrained import Checkpoint

    def read(data: bytes) -> object:
        source = data.decode("utf-8", "surrogateescape")
        return Checkpoint(source=source).folder("vae")

    seeds = [b"./nosuch", b"models/sd15", b"someone/model", b"~/nosuch", b"/nosuch", b"C:\\models"]
    return Reading(seeds=seeds, damage=mutate.damage, read=read, file=False)


def page_requests(bench: Bench) -> Reading:
    """Requests to the labelling page over a connection, complete and not."""
    import socket
    import threading

    from dpo_video.data.label import StoreTask, recipe
    from dpo_video.data.labels import LabelSet
    from dpo_video.labeler._page import server
    from dpo_video.labeler._page.session import LabelSession
    from dpo_video.labeler.page import Page

    server.PATIENCE = 0.2
    made = recipe(bench.store, bench.model, {"name": "page"}, 0.25)
    label_set = LabelSet.open_or_create(bench.store.folder, "asked", made)
    session = LabelSession(StoreTask(bench.store, bench.model, label_set, Page()), seed=0)
    listener = server.listen(0)
    port = listener.getsockname()[1]
    threading.Thread(target=server.serve, args=(session, listener, "t"), daemon=True).start()

    def request(target: str, body: str = "") -> bytes:
        head = f"{'POST' if body else 'GET'} {target} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        if body:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        return f"{head}connection: close\r\n\r\n{body}".encode()

    def read(data: bytes) -> object:
        answer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(data)
            while part := client.recv(1 << 16):
                answer += part
        status = answer.split(b" ")[1] if answer.startswith(b"HTTP/1.1 ") else b"closed"
        assert status not in (b"500", b"503"), status
        if status != b"200":
            raise UserError(f"refused with {status.decode(errors='replace')}")
        return answer

    answer = '{"rater": "ann", "pair": 0, "segment": 0, "answer": "left"}'
    seeds = [request("/t/"), request("/t/view?rater=ann"), request("/t/summary?rater=ann"),
             request("/t/answer", answer), request("/t/undo", '{"rater": "ann", "revision": 1}'),
             request("/t/sheet/0/0/left.png?rater=ann")]  # fmt: skip
    return Reading(seeds=seeds, damage=mutate.damage_request, read=read, file=False)


def reference_cache(name: str, damage: Damage) -> Callable[[Bench], Reading]:
    """A file of a reference cache, which is filled and read."""

    def make(bench: Bench) -> Reading:
        from dpo_video.training.reference_cache import (
            PairDraw,
            ReferenceCache,
            ReferenceCacheManifest,
        )

        manifest = ReferenceCacheManifest.of(bench.model, 0, "no")
        draws = [PairDraw(0, 0), PairDraw(1, 0)]

        def predict(draw: PairDraw) -> torch.Tensor:
            generator = torch.Generator().manual_seed(draw.pair)
            return torch.randn(2, *bench.model.latent_shape, generator=generator)

        ReferenceCache(bench.store, manifest).fill(draws, predict)
        path = next((bench.store.folder / "reference_cache").rglob(name))
        original = path.read_bytes()

        def read(data: bytes) -> object:
            place(path, data)
            try:
                opened = ReferenceCache(bench.store, manifest)
                opened.fill(draws, predict)
                return opened.read(draws)
            finally:
                place(path, original)

        return Reading(seeds=[original], damage=damage, read=read)

    return make


READERS: dict[str, Callable[[Bench], Reading]] = {
    "run.toml": run_toml,
    "assignments": assignments,
    "command line": command_line,
    "store.json": store_file("store.json", mutate.damage_json),
    "pairs.jsonl": store_file("pairs.jsonl", mutate.damage_lines),
    "latents": store_file("latents/00000.safetensors", mutate.damage_safetensors),
    "contexts": store_file("contexts/*.safetensors", mutate.damage_safetensors),
    "shards.json": packed_file("shards.json", mutate.damage_json),
    "shard of pairs": packed_file("shards/pairs-00001.*", mutate.damage_safetensors),
    "shard of prompts": packed_file("shards/prompts-00001.*", mutate.damage_safetensors),
    "lines elsewhere": packed_file("pairs.jsonl", mutate.damage_lines, elsewhere=True),
    "shard elsewhere": packed_file("shards/pairs-00001.*", mutate.damage_safetensors, True),
    "pairs URL": pairs_url,
    "labels recipe": label_file(".json", mutate.damage_json),
    "labels": label_file(".jsonl", mutate.damage_lines),
    "recorded labels": recorded,
    "folder pairs": folder_lines,
    "published .pt": videodpo_pair,
    "checkpoint state": checkpoint("state.safetensors", mutate.damage_state),
    "checkpoint weights": checkpoint("adapter_model.safetensors", mutate.damage_safetensors),
    "checkpoint pointer": checkpoint("latest", mutate.damage),
    "checkpoint manifest": checkpoint("checkpoint.json", mutate.damage_json),
    "adapter config": adapter("adapter_config.json", mutate.damage_json),
    "adapter weights": adapter("adapter_model.safetensors", mutate.damage_safetensors),
    "log.jsonl": log,
    "training prompts": run_prompts,
    "prompts.txt": prompts(".txt", "a square\nein Kreis, gr\u00fcn\n", mutate.damage),
    "prompts.csv": prompts(
        ".csv", 'prompt,seed,negative_prompt\n"a square, red",3,blur\na cat,,\n', mutate.damage
    ),
    "prompts.jsonl": prompts(".jsonl", '{"prompt": "a cat", "seed": 3}\n' * 3, mutate.damage_lines),
    "drawn videos": drawn_videos,
    "mp4": video(".mp4"),
    "gif": video(".gif"),
    "webm": video(".webm"),
    "avi": video(".avi"),
    "mkv": video(".mkv"),
    "mpg": video(".mpg"),
    "ts": video(".ts"),
    "flv": video(".flv"),
    "wmv": video(".wmv"),
    "webp": video(".webp"),
    "films in HDR and with alpha": coloured,
    "contents below other names": wrong_names,
    "stills": stills,
    "pictures": pictures,
    "entries.toml": entries,
    "answers of a model": answers,
    "config.json of a model": model_config,
    "names of models": model_names,
    "requests to the page": page_requests,
    "metadata.jsonl": captions,
    "reference cache manifest": reference_cache("manifest.json", mutate.damage_json),
    "reference cache predictions": reference_cache(
        "00000-000.safetensors", mutate.damage_safetensors
    ),
}
