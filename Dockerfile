# The official SGLang image with --batchllm added. Needs an NVIDIA GPU to run:
#   docker build -t sglang-batchllm .
#   docker run --gpus all --ipc=host -p 30000:30000 sglang-batchllm --model-path MODEL
FROM lmsysorg/sglang:v0.5.17

WORKDIR /opt/sglang-batchllm
COPY pyproject.toml README.md LICENSE ./
COPY python ./python

# --no-deps leaves the image's SGLang as it is; the image is a system that pip may own.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-deps . \
    && python3 -c 'from importlib.metadata import version; v = version("sglang"); \
assert v == "0.5.17", f"this image has SGLang {v}"'

EXPOSE 30000
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--batchllm", "--host", "0.0.0.0", "--port", "30000"]
CMD ["--model-path", "Qwen/Qwen2.5-7B-Instruct"]
