use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Decimal128Array, DictionaryArray, Float64Array, Int64Array, ListArray,
    StringArray, TimestampSecondArray,
};
use arrow::datatypes::{Int32Type, Int64Type};
use arrow::record_batch::RecordBatch;
use expect_test::{Expect, expect};

use super::*;
use crate::document::{DocumentId, Generated, Lease};
use crate::infer::sequence::FinishReason;

fn document() -> Document {
    let tags = ListArray::from_iter_primitive::<Int64Type, _, _>([Some(vec![Some(1), Some(2)])]);
    let section: DictionaryArray<Int32Type> = ["sport"].into_iter().collect();
    let rows = RecordBatch::try_from_iter_with_nullable([
        ("id", Arc::new(Int64Array::from(vec![7])) as ArrayRef, false),
        ("title", Arc::new(StringArray::from(vec![None::<&str>])), true),
        ("body", Arc::new(StringArray::from(vec!["Rain & <sun>"])), true),
        ("blank", Arc::new(StringArray::from(vec![" \n"])), true),
        ("score", Arc::new(Float64Array::from(vec![0.5])), true),
        ("good", Arc::new(BooleanArray::from(vec![true])), true),
        ("tags", Arc::new(tags), true),
        ("section", Arc::new(section), true),
        ("at", Arc::new(TimestampSecondArray::from(vec![0])), true),
        ("price", Arc::new(Decimal128Array::from(vec![1250]).with_precision_and_scale(6, 2).unwrap()), true),
    ])
    .unwrap();
    let mut document = Document::new(DocumentId { file: 0, row: 3 }, Arc::new(rows), 0, Lease::default());
    let summary = Generated {
        text: "Wet.".to_owned(),
        finish_reason: FinishReason::Stop,
        prompt_len: 1,
        output_len: 1,
    };
    document.results.insert("summary".into(), summary);
    document
}

#[track_caller]
fn check(template: &str, expect: Expect) {
    let answer = match Template::new(template).unwrap().render(&document()) {
        Ok(text) => text,
        Err(error) => format!("{}: {}", error.kind.as_str(), error.message),
    };
    expect.assert_eq(&answer);
}

#[test]
fn prints_columns_of_every_kind_and_earlier_results() {
    check("{{ id }} {{ body }}", expect!["7 Rain & <sun>"]);
    check("{{ summary }}{% if good %} good{% endif %} {{ score }}", expect!["Wet. good 0.5"]);
    check("{% for tag in tags %}<{{ tag }}>{% endfor %} {{ section }}", expect!["<1><2> sport"]);
    check("{{ at }} {{ price }}", expect!["1970-01-01T00:00:00 12.50"]);
    check("{{ body.upper() }} {{ range(2) | list }}", expect!["RAIN & <SUN> [0, 1]"]);
}

#[test]
fn a_null_must_be_handled_by_the_template() {
    check(
        "a\n{{ body }} {{ title }}",
        expect![[
            r#"null: null in column "title" (line 2 of the template); to allow it write {{ title or "…" }}"#
        ]],
    );
    check(r#"{{ title or "untitled" }}: {{ body }}"#, expect!["untitled: Rain & <sun>"]);
    check("{% if title %}{{ title }}{% endif %}{{ body }}", expect!["Rain & <sun>"]);
}

#[test]
fn an_empty_document_is_refused_unless_a_result_is_used_alone() {
    check("Sum up: {{ blank }}", expect![[r#"empty: the document is empty: nothing in column "blank""#]]);
    check("{{ blank }}{{ body }}", expect![" \nRain & <sun>"]);
    check("Sum up: {{ summary }}", expect!["Sum up: Wet."]);
    check("no columns", expect!["no columns"]);
}

#[test]
fn a_failing_template_names_its_line() {
    check(
        "\n{{ id / 0 }}",
        expect!["template: the template failed: unable to calculate 7 / 0 (line 2 of the template)"],
    );
    check(
        "{{ body.colour }}",
        expect!["template: the template failed: `body.colour` is undefined (line 1 of the template)"],
    );
}

#[test]
fn knows_the_names_it_needs() {
    let template =
        Template::new("{% set x = a %}{{ x }}{{ b.c }}{% for y in d %}{{ y }}{% endfor %}").unwrap();
    assert_eq!(template.variables().iter().map(String::as_str).collect::<Vec<_>>(), ["a", "b", "d"]);
    assert_eq!(Template::new("a\n{{ ").unwrap_err().line(), Some(2));
}
