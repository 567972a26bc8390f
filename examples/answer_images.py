"""Answer a question about some images, without a job and without Ray.

After `gc2ray demo`, which writes a small trained model to demo-output/model:

    python answer_images.py demo-output/model "How many coloured objects are there?" IMAGE ...
"""

import sys

import gc2ray


def main(model_path: str, question: str, *images: str) -> None:
    """Print an answer for each image."""
    with gc2ray.load_model(model_path, method="globalcom2", retention=0.25) as model:
        answers = model.answer(images, question)
    for image, answer in zip(images, answers, strict=True):
        kept, full = answer.visual_tokens_kept, answer.visual_tokens_full
        print(f"{image}: {answer} ({kept} of {full} visual tokens)")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
