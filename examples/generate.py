"""Generate synthetic subjects: aligned images of every modality, with the tumour mask.

    python examples/generate.py                                            # 8 subjects from the bundled pipeline
    python examples/generate.py --num_subjects 100 --modalities T1 FLAIR --output outputs/hundred
    python examples/generate.py --pipeline outputs/ldm                     # a pipeline that you trained, or one of the Hub
    python examples/generate.py --format dicom --output outputs/dicom      # or dataset: a data set to train on

The output folder then holds sheet.png to look at, a folder each subject with 16-bit PNG and NIfTI files (or what --format
says), and manifest.json, which says how to draw the same subjects again. The same seed gives the same subjects, however
many and whichever modalities you ask for. All of it is synthetic and not for diagnosis.
"""

import argparse
import time

import torch

from dldm_pipeline import DLDMPipeline
from dldm_pipeline.cli import add_example_arguments, exit_on_user_error, find_pipeline
from dldm_pipeline.data.export import FORMATS, check_export_folder, export_subjects


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_subjects", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other subjects (default: %(default)s)")
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="which, in which order (default: all it knows)")
    parser.add_argument(
        "--num_inference_steps", type=int, default=10, help="denoising steps of the anatomy (default: %(default)s)"
    )
    parser.add_argument(
        "--num_style_inference_steps", type=int, default=10, help="and of each appearance (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="nifti",
        help="nifti: NIfTI and PNG files; dicom: a study each subject; dataset: for training scripts (default: %(default)s)",
    )
    add_example_arguments(parser, "outputs/generated")
    return parser.parse_args(argv)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    try:
        check_export_folder(args.output, args.overwrite, args.format)
    except ImportError as error:  # highdicom is an extra
        raise ValueError(str(error)) from error
    folder = find_pipeline(args.pipeline)
    pipeline = DLDMPipeline.from_pretrained(folder).to(args.device)
    settings = {
        "num_inference_steps": args.num_inference_steps,
        "num_style_inference_steps": args.num_style_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    output = pipeline(
        num_subjects=args.num_subjects,
        modalities=args.modalities,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="np",
        **settings,
    )
    export_subjects(
        output,
        args.output,
        seed=args.seed,
        settings={**settings, "device": args.device, "num_threads": torch.get_num_threads()},
        checkpoint=folder,
        overwrite=args.overwrite,
        format=args.format,
    )
    subjects, modalities = output.images.shape[:2]
    seconds = time.perf_counter() - started
    print(f"{subjects} subjects x {modalities} modalities and masks in {seconds:.0f} s")
    print(f"look at {args.output / 'sheet.png'}")


if __name__ == "__main__":
    main()
