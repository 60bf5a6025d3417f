"""Generate synthetic subjects: aligned images of every modality, with the tumour mask.

    python examples/generate.py                                            # 8 subjects from the bundled pipeline
    python examples/generate.py --num_subjects 100 --modalities T1 FLAIR --output outputs/hundred
    python examples/generate.py --pipeline outputs/ldm                     # a pipeline that you trained, or one of the Hub
    python examples/generate.py --num_subjects 4 --appearances 4           # four anatomies, each as four scanners show it
    python examples/generate.py --format dicom --output outputs/dicom      # or dataset: a data set to train on

The output folder gets sheet.png for a first look, a folder for each subject with 16-bit PNG and NIfTI files (or the files of
--format), and manifest.json with all that is needed to generate the same subjects again. A seed gives the same subjects for
any number of subjects and any choice of modalities. With --appearances, appearances.png shows an anatomy in each row and an
appearance in each column of a modality. All images are synthetic and not for diagnosis.
"""

import argparse
import time

import torch

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.cli import add_sampling_arguments, exit_on_user_error, find_pipeline, save_subjects
from dldm_pipeline.data.export import FORMATS, check_export_folder
from dldm_pipeline.data.sheet import appearances_sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_subjects", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--appearances", type=int, default=1, help="scanners that show each anatomy (default: 1)")
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="which, in which order (default: all)")
    formats = "nifti: NIfTI and PNG; dicom: a study for each subject; dataset: for training scripts"
    parser.add_argument("--format", choices=FORMATS, default="nifti", help=f"{formats} (default: %(default)s)")
    steps = "denoising steps of each style; those of the structure are --num_inference_steps (default: %(default)s)"
    parser.add_argument("--num_style_inference_steps", type=int, default=5, help=steps)
    add_sampling_arguments(parser, "outputs/generated")
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    if args.appearances < 1:
        raise ValueError(f"--appearances {args.appearances}: must be at least 1")
    if args.appearances > 1 and args.format == "dataset":
        raise ValueError("--appearances: one anatomy could be in training and validation; use another --format.")
    check_export_folder(args.output, args.overwrite, args.format)
    folder = find_pipeline(args.pipeline)
    pipeline = DLDMPipeline.from_pretrained(folder).to(args.device)
    names = ("num_inference_steps", "num_style_inference_steps", "guidance_scale")
    settings = {name: getattr(args, name) for name in names}
    generator = torch.Generator().manual_seed(args.seed)
    kept, count = {}, args.num_subjects * args.appearances
    if args.appearances > 1:
        latents = pipeline(
            max(args.num_subjects, args.appearances),
            args.modalities,
            generator=generator,
            output_type="latent",
            **settings,
        )
        kept["structure"] = latents.structure[: args.num_subjects].repeat_interleave(args.appearances, dim=0)
        kept["styles"] = latents.styles[: args.appearances].repeat(args.num_subjects, 1, 1)
    output = pipeline(count, args.modalities, generator=generator, output_type="np", **settings, **kept)
    settings["appearances"] = args.appearances
    save_subjects(output, args, folder, settings, format=args.format)
    if args.appearances > 1:
        grid = output.images.reshape(args.num_subjects, args.appearances, *output.images.shape[1:])
        appearances_sheet(grid, output.modalities, args.output / "appearances.png")
    seconds = time.perf_counter() - started
    print(f"{count} subjects x {len(output.modalities)} modalities and masks in {seconds:.0f} s")
    print(f"look at {args.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
