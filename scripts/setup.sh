#!/bin/sh
# Checks what building and testing need, and installs through apt-get what is missing. Quick when all is there.
set -eu

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

packages=""
has cc || packages="$packages gcc libc6-dev"
has c++ || packages="$packages g++"
has make || packages="$packages make"
# librdkafka is built from source with the system's TLS.
has pkg-config || packages="$packages pkg-config"
pkg-config --exists openssl 2>/dev/null || packages="$packages libssl-dev"
if [ -z "${KAFKA_BROKERS:-}" ]; then
    # The broker of the tests and the demo.
    has java || packages="$packages openjdk-17-jre-headless"
    has mvn || packages="$packages maven"
fi
has git || packages="$packages git"
has python3 || packages="$packages python3"
python3 -m pip --version >/dev/null 2>&1 || packages="$packages python3-pip"
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || packages="$packages python3-venv"

if [ -n "$packages" ]; then
    has apt-get || fail "missing:$packages (names of Debian packages); install them and try again"
    if [ "$(id -u)" = 0 ]; then sudo=""
    elif has sudo && sudo -n true 2>/dev/null; then sudo="sudo -n"
    else fail "missing:$packages; install them with: sudo apt-get install$packages"
    fi
    say "installing$packages (a minute or two)"
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    # shellcheck disable=SC2086 # one word for each package
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi

has cargo || fail "Rust is missing: install it from https://rustup.rs and try again"
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
have=$(cargo --version | cut -d ' ' -f 2)
oldest=$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n 1)
[ "$oldest" = "$wanted" ] || fail "Rust $have is too old, $wanted is needed: run 'rustup update stable' and try again"

for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 && continue
    name=$component
    [ "$component" = fmt ] && name=rustfmt
    has rustup || fail "cargo $component is missing: install the $name that comes with your Rust"
    say "adding the Rust component $name"
    rustup component add "$name" || fail "cannot add $name: run 'rustup component add $name' and try again"
done

say "ready: Rust $have, $(python3 --version), $(cc --version | head -n 1)"
