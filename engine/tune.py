"""Time the fused step of `engine.kernels` on this GPU, or measure its tiles anew.

    python -m engine.tune            a step of each norm, and its kernels one by one (microseconds)
    python -m engine.tune --tiles    the fastest `TILES`, to be copied into engine/kernels.py: some minutes

On random images, captured as a CUDA graph; a step ends with Muon's.
"""

import argparse
import itertools

import torch

import models
from engine import kernels
from engine.muon import Muon

IMAGES = 50_000


def draw_batch(count, device, seed=0):
    """Return chosen, shift and flip of a random batch."""
    generator = torch.Generator(device).manual_seed(seed)
    chosen = torch.randperm(IMAGES, generator=generator, device=device)[:count]
    shift = torch.randint(-2, 3, (count, 2), generator=generator, device=device)
    return chosen, shift, torch.rand(count, generator=generator, device=device) < 0.5


def microseconds(run, times):
    """Return the time of one `run`, of which `times` are captured together: the median of seven replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(times):
                run()
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1000 / times)
    return sorted(found)[3]


def build(norm, images, labels, batch_size):
    """Return a FusedNet and its MuonStep."""
    torch.manual_seed(0)
    net = models.Net(norm).to(images.device, memory_format=torch.channels_last)
    fused = kernels.FusedNet(net, images, labels, batch_size, "flip+crop")
    lr = torch.tensor(0.03, device=images.device)
    return fused, kernels.MuonStep(fused, Muon(models.param_groups(net, 0.5), lr, dtype=torch.float16))


def time_steps(images, labels, batch_size):
    """Print the time of a step of each norm, and of its kernels."""
    for norm in ("batch", "layer", "group"):
        fused, muon = build(norm, images, labels, batch_size)
        batch = draw_batch(batch_size, images.device)

        def step(fused=fused, muon=muon, batch=batch):
            fused(*batch)
            muon()

        print(f"\n{norm} norm, batch {batch_size}: {microseconds(step, 8):.0f} us")
        for name, kernel, grid, arguments, options in [*fused.launches(*batch), muon.launch()]:

            def launch(kernel=kernel, grid=grid, arguments=arguments, options=options):
                kernel[grid](*arguments, **options)

            print(f"  {name:20} {microseconds(launch, 20):6.1f}")


def candidates(name):
    """Yield the Tiles worth a try for one of TILES' keys."""
    layer, way = name.split()
    pixels = [count for count in (64, 128, 256) if count <= kernels.SIDES[layer] ** 2]
    taps = {"C1 forward": (4,), "C1 backward": (16,)}.get(name, (1, 2) if way == "forward" else (2, 4))
    for count, each, warps, fill in itertools.product(pixels, taps, (4, 8), pixels[-2:]):
        for programs in (1, 2, 4) if way == "backward" else (1,):
            yield kernels.Tile(count, count if name == "C1 backward" else fill, each, warps, programs)


def tune(images, labels, norm="group"):
    """Print the fastest Tile of each layer and direction, for 500 images and for 125."""

    def launch_with(name, tile, batch_size):
        kernels.TILES[name] = (tile, tile)
        fused, _ = build(norm, images, labels, batch_size)
        launches = fused.launches(*draw_batch(batch_size, images.device))
        return fused, next(launch for launch in launches if launch[0] == name)

    for name, default in list(kernels.TILES.items()):
        tiles, best = list(dict.fromkeys(candidates(name))), []
        kernels.compile_all([launch_with(name, tile, 1)[1] for tile in tiles], progress=False)
        for small_batch, batch_size in enumerate((500, 125)):
            found = {}
            for tile in dict.fromkeys([default[small_batch], *tiles]):
                try:
                    fused, (_, kernel, grid, arguments, options) = launch_with(name, tile, batch_size)
                    fused(*draw_batch(batch_size, images.device))

                    def launch(kernel=kernel, grid=grid, arguments=arguments, options=options):
                        kernel[grid](*arguments, **options)

                    found[tile] = microseconds(launch, 10)
                except Exception as error:  # it needs more than a multiprocessor has
                    print(f"  {name} {tuple(tile)}: {type(error).__name__}")
            best.append(min(found, key=found.get))
            today = found.get(default[small_batch], float("nan"))
            print(f"{name}, batch {batch_size}: {found[best[-1]]:.1f} us, now {today:.1f}", flush=True)
        kernels.TILES[name] = default
        print(f'    "{name}": ({", ".join("Tile" + str(tuple(tile)) for tile in best)}),', flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", action="store_true", help="measure TILES anew")
    parser.add_argument("--batch-size", type=int, default=500)
    options = parser.parse_args(arguments)
    try:
        models.whole_number("batch-size", options.batch_size, 1, IMAGES)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU to time the step on")
    device = torch.device("cuda")
    images = torch.randint(256, (IMAGES, 32, 32, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (IMAGES,), device=device)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "Triton", kernels.triton.__version__)
    if options.tiles:
        tune(images, labels)
        return
    launches = []
    for norm in ("batch", "layer", "group"):
        fused, muon = build(norm, images, labels, options.batch_size)
        launches += [*fused.launches(*draw_batch(options.batch_size, device)), muon.launch()]
    kernels.compile_all(launches)
    time_steps(images, labels, options.batch_size)


if __name__ == "__main__":
    main()
