#!/bin/sh
# Streams the articles of an example topic to topic, with a broker of its own unless KAFKA_BROKERS names one.
set -eu

tidemill=$1
example=examples/kafka-summaries
dir=$(mktemp -d "${TMPDIR:-/tmp}/tidemill-kafka.XXXXXX")

sh scripts/kafka.sh start --dir "$dir" --parent $$ > "$dir/started"
stop() {
    sh scripts/kafka.sh stop --dir "$dir"
    rm -rf "$dir"
    [ "$KAFKA_BROKERS" = "$given" ] || echo "demo: the broker is stopped"
}
given=${KAFKA_BROKERS:-none}
trap stop EXIT
trap 'exit 130' INT TERM
KAFKA_BROKERS=$(sed -n 's/^KAFKA_BROKERS=//p' "$dir/started")
export KAFKA_BROKERS
echo "demo: broker at $KAFKA_BROKERS"

"$tidemill" topics create articles summaries summaries-errors --partitions 4
"$tidemill" topics write articles --from examples/news-summaries/articles.jsonl --key id
# The state belongs to the broker that is about to go.
sed "s|^name:|state: $dir/state\nname:|" "$example/pipeline.yaml" > "$dir/pipeline.yaml"
"$tidemill" run --until-end "$dir/pipeline.yaml"
echo "demo: the first summaries in the topic (tidemill topics read summaries)"
"$tidemill" topics read summaries --values --limit 3
errors=$("$tidemill" topics read summaries-errors | wc -l)
summaries=$("$tidemill" topics read summaries | wc -l)
echo "demo: $summaries summaries, $errors errors"
