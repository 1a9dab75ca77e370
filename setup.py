from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

regions = ["lmdb>=1.4", "h5py>=3.10", "msgpack>=1.0"]
bigru = ["nltk>=3.8"]
demo = ["gradio>=4"]
test = ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", "import-linter>=2.1", "open_clip_torch>=2.26", "peft>=0.14"]
test += regions + bigru  # the optional readers are tested too

setup(
    name="hf_vlp",
    version="0.1.0",
    description="VSE-infinity, CLIP, ViLBERT, ViLT, ALBEF and VLMo as Hugging Face models: exact, trainable, fast",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hf_vlp", "hf_vlp.*", "conversion", "conversion.*"]),
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "transformers>=5.15,<6",
        "accelerate>=1.2",
        "datasets>=3.2",
        "safetensors>=0.4",
        "huggingface_hub>=1.0",
        "timm>=1.0",
        "POT>=0.9.5",
        "pillow>=10",
        "pyyaml>=6",
        "ftfy>=6.1",
        "regex>=2023.12",
        "numpy>=1.26",
        "scipy>=1.11",
        "tqdm>=4.66",
        "matplotlib>=3.8",
    ],
    extras_require={"regions": regions, "bigru": bigru, "demo": demo, "test": test},
)
