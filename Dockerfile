# For those who have a container engine; `cargo xtask image` needs none, and adds CA certificates and user names.
# BINARY is a static spegel below the build's context, as `cargo xtask image` builds it.
FROM scratch
ARG BINARY=target/x86_64-unknown-linux-gnu/release/spegel
COPY ${BINARY} /spegel
ENTRYPOINT ["/spegel"]
