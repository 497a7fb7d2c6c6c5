# What the scripts that start servers share; they set NAME first.

say() { printf '%s: %s\n' "$NAME" "$*" >&2; }
fail() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

need_java() {
    has java || fail "Java is missing: install it with: apt-get install openjdk-17-jre-headless"
    has mvn || fail "Maven is missing: install it with: apt-get install maven"
}

# So many ports that nobody uses now.
free_ports() {
    python3 -c '
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in sockets: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))' "$1"
}

# A process that nobody has waited for yet is not alive.
runs() { kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.*Z' "/proc/$1/status"; }

# Ends container $1 when process $2 that asked for it is gone.
end_container_with() {
    [ -n "$2" ] || return 0
    setsid sh -c "while kill -0 $2 2>/dev/null; do sleep 0.5; done
        docker rm --force $1" </dev/null >/dev/null 2>&1 &
}

# Ends process $1 when process $2 that asked for it is gone, however it went.
end_with() {
    [ -n "$2" ] || return 0
    setsid sh -c "while kill -0 $2 2>/dev/null && kill -0 $1 2>/dev/null; do sleep 0.5; done
        kill -9 $1 2>/dev/null" </dev/null >/dev/null 2>&1 &
}
