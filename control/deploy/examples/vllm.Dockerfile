# An image of vLLM with kvtide, from the root of the repository after `make wheel`:
#
#     docker build -f control/deploy/examples/vllm.Dockerfile -t REGISTRY/vllm-kvtide:VERSION .
#
# No test builds it: the tests need no container runtime.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY target/wheels/kvtide-*.whl /tmp/
RUN pip install --no-cache-dir /tmp/kvtide-*.whl && rm /tmp/kvtide-*.whl
