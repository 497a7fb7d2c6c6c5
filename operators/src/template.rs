//! Prompt templates: Jinja over the columns of a document and the results of earlier steps.
//!
//! Printing a null is an error of the document, never an empty string: `{{ title }}` refuses a row without
//! a title, `{{ title or "untitled" }}` says what to do with it. A document whose columns are all empty is
//! refused too, since a model would answer it with an invention.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use arrow::array::{Array, AsArray, StructArray};
use arrow::datatypes::{
    DataType, Field, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use minijinja::{Environment, Error, ErrorKind as JinjaErrorKind, UndefinedBehavior, Value};
use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::chat::jinja;
use crate::document::{self, Document};

/// Instructions one rendering may take, so that a loop in a template cannot stop the pipeline.
const MAX_FUEL: u64 = 10_000_000;
const NAME: &str = "prompt";
/// Metadata of a field which says what its text is.
const FORMAT_KEY: &str = "tidemill.format";

/// One compiled template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    /// The names it uses and does not set itself, sorted.
    variables: BTreeSet<String>,
}

/// Why a document could not be rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderError {
    pub kind: document::ErrorKind,
    pub message: String,
}

impl Template {
    /// Compiles `source`; an error carries the line within it.
    pub fn new(source: &str) -> Result<Self, Error> {
        let mut environment = jinja();
        environment.set_fuel(Some(MAX_FUEL));
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(|out, state, value| {
            if value.is_none() {
                return Err(Error::new(JinjaErrorKind::UndefinedError, "printed a null"));
            }
            minijinja::escape_formatter(out, state, value)
        });
        environment.add_template_owned(NAME, source.to_owned())?;
        let globals: BTreeSet<String> = environment.globals().map(|(name, _)| name.to_owned()).collect();
        let variables = environment
            .get_template(NAME)?
            .undeclared_variables(false)
            .into_iter()
            .filter(|name| !globals.contains(name))
            .collect();
        Ok(Self { environment, variables })
    }

    pub fn variables(&self) -> &BTreeSet<String> {
        &self.variables
    }

    /// Renders one document whatever it holds; for keys and headers.
    pub fn render_value(&self, document: &Document) -> Result<String, RenderError> {
        self.render_with(document, |_| None)
    }

    /// Renders one document. Every variable must be a column or the name of an earlier step.
    pub fn render(&self, document: &Document) -> Result<String, RenderError> {
        self.render_with(document, |values| empty(document, values))
    }

    fn render_with(
        &self,
        document: &Document,
        refuse: impl FnOnce(&[(&str, Value)]) -> Option<String>,
    ) -> Result<String, RenderError> {
        let fields = Fields::of(document, &self.variables);
        let mut nulls = Vec::new();
        let mut values = Vec::new();
        for (index, name) in self.variables.iter().enumerate() {
            let value = variable(document, &fields, index, name);
            if value.is_none() {
                nulls.push(name.as_str());
            }
            values.push((name.as_str(), value));
        }
        if let Some(message) = refuse(&values) {
            return Err(RenderError { kind: document::ErrorKind::Empty, message });
        }
        let template = self.environment.get_template(NAME).expect("compiled in `new`");
        // As a value it is taken as it is; a map would be serialized entry by entry.
        let context = Value::from(values.into_iter().collect::<BTreeMap<_, _>>());
        template.render(context).map_err(|error| explain(&error, &nulls))
    }
}

/// The fields of a row whose text is a JSON object, besides its columns: those of some names, in their order.
struct Fields<'a>(Option<Vec<Option<&'a RawValue>>>);

impl<'a> Fields<'a> {
    fn of(document: &'a Document, names: &BTreeSet<String>) -> Self {
        let schema = document.batch().schema_ref();
        let found = schema.fields().iter().position(|field| is_json(field)).and_then(|index| {
            let text = document.batch().column(index).as_string_opt::<i32>()?;
            let mut text = serde_json::Deserializer::from_str(text.value(document.index()));
            text.deserialize_map(Wanted(names)).ok()
        });
        Self(found)
    }

    /// A field that is not there is null: objects of a stream need not have the same fields.
    fn get(&self, index: usize) -> Option<Value> {
        let fields = self.0.as_ref()?;
        let value = fields[index].and_then(|raw| serde_json::from_str::<serde_json::Value>(raw.get()).ok());
        Some(value.map_or(Value::from(()), json))
    }
}

/// Looks for the fields of these names and passes over the others. Of a name that occurs twice, the last one counts.
#[derive(Clone, Copy)]
struct Wanted<'n>(&'n BTreeSet<String>);

impl<'de> Visitor<'de> for Wanted<'_> {
    type Value = Vec<Option<&'de RawValue>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
        let mut found = vec![None; self.0.len()];
        while let Some(index) = fields.next_key_seed(Name(self.0))? {
            match index {
                Some(index) => found[index] = Some(fields.next_value()?),
                None => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

/// The place of a name among those that are wanted.
struct Name<'n>(&'n BTreeSet<String>);

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|wanted| wanted == name))
    }
}

/// Whether a text column holds JSON objects, whose fields templates may name.
pub fn is_json(field: &Field) -> bool {
    field.metadata().get(FORMAT_KEY).is_some_and(|format| format == "json")
}

/// The value of a name, which stands at `index` among those that the fields were asked for.
fn variable(document: &Document, fields: &Fields<'_>, index: usize, name: &str) -> Value {
    if let Some(result) = document.results.get(name) {
        return Value::from(result.text.as_str());
    }
    match document.batch().column_by_name(name) {
        Some(column) => cell(column, document.index()),
        None => fields.get(index).unwrap_or(Value::UNDEFINED),
    }
}

/// Says so if the template uses columns and none of them holds anything.
fn empty(document: &Document, values: &[(&str, Value)]) -> Option<String> {
    let mut columns = values.iter().filter(|(name, _)| !document.results.contains_key(*name)).peekable();
    columns.peek()?;
    let names: Vec<&str> = columns.clone().map(|(name, _)| *name).collect();
    let blank = |value: &Value| value.as_str().is_some_and(|text| text.trim().is_empty());
    let nothing = columns.clone().all(|(_, value)| blank(value) || value.is_none());
    (nothing && columns.any(|(_, value)| blank(value)))
        .then(|| format!("the document is empty: nothing in {}", list(&names)))
}

fn explain(error: &Error, nulls: &[&str]) -> RenderError {
    let at = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    let is_null = error.kind() == JinjaErrorKind::UndefinedError && !nulls.is_empty();
    if is_null {
        let message = format!(
            "null in {}{at}; to allow it write {{{{ {} or \"…\" }}}}",
            list(nulls),
            nulls.first().expect("not empty")
        );
        return RenderError { kind: document::ErrorKind::Null, message };
    }
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    RenderError { kind: document::ErrorKind::Template, message: format!("the template failed: {detail}{at}") }
}

fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    let word = if names.len() == 1 { "column" } else { "columns" };
    format!("{word} {}", quoted.join(", "))
}

/// One cell as a template value. Types without a Jinja counterpart print as Arrow displays them.
fn cell(array: &dyn Array, index: usize) -> Value {
    if array.is_null(index) {
        return Value::from(());
    }
    match array.data_type() {
        DataType::Null => Value::from(()),
        DataType::Utf8 => Value::from(array.as_string::<i32>().value(index)),
        DataType::LargeUtf8 => Value::from(array.as_string::<i64>().value(index)),
        DataType::Utf8View => Value::from(array.as_string_view().value(index)),
        DataType::Boolean => Value::from(array.as_boolean().value(index)),
        DataType::Int8 => Value::from(array.as_primitive::<Int8Type>().value(index)),
        DataType::Int16 => Value::from(array.as_primitive::<Int16Type>().value(index)),
        DataType::Int32 => Value::from(array.as_primitive::<Int32Type>().value(index)),
        DataType::Int64 => Value::from(array.as_primitive::<Int64Type>().value(index)),
        DataType::UInt8 => Value::from(array.as_primitive::<UInt8Type>().value(index)),
        DataType::UInt16 => Value::from(array.as_primitive::<UInt16Type>().value(index)),
        DataType::UInt32 => Value::from(array.as_primitive::<UInt32Type>().value(index)),
        DataType::UInt64 => Value::from(array.as_primitive::<UInt64Type>().value(index)),
        DataType::Float16 => Value::from(array.as_primitive::<Float16Type>().value(index).to_f32()),
        DataType::Float32 => Value::from(array.as_primitive::<Float32Type>().value(index)),
        DataType::Float64 => Value::from(array.as_primitive::<Float64Type>().value(index)),
        DataType::List(_) => items(array.as_list::<i32>().value(index).as_ref()),
        DataType::LargeList(_) => items(array.as_list::<i64>().value(index).as_ref()),
        DataType::FixedSizeList(..) => items(array.as_fixed_size_list().value(index).as_ref()),
        DataType::Struct(_) => fields(array.as_struct(), index),
        DataType::Binary => text(array.as_binary::<i32>().value(index)),
        DataType::LargeBinary => text(array.as_binary::<i64>().value(index)),
        DataType::Map(..) => entries(&array.as_map().value(index)),
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            cell(dictionary.values(), dictionary.normalized_keys()[index])
        }
        _ => displayed(array, index),
    }
}

fn items(values: &dyn Array) -> Value {
    Value::from((0..values.len()).map(|index| cell(values, index)).collect::<Vec<_>>())
}

fn fields(values: &StructArray, index: usize) -> Value {
    let cells = values.columns().iter().map(|column| cell(column, index));
    Value::from(values.column_names().into_iter().zip(cells).collect::<BTreeMap<_, _>>())
}

/// A JSON value; its depth is bounded by the parser.
fn json(value: serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => number.as_f64().map_or(Value::from(()), Value::from),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => Value::from(items.into_iter().map(json).collect::<Vec<_>>()),
        Json::Object(fields) => Value::from(
            fields.into_iter().map(|(name, value)| (name, json(value))).collect::<BTreeMap<_, _>>(),
        ),
    }
}

/// A map with keys of text. Of a key that occurs twice, the last one counts.
fn entries(values: &StructArray) -> Value {
    let (keys, values) = (values.column(0), values.column(1));
    let pairs = (0..keys.len()).map(|index| (cell(keys, index).to_string(), cell(values, index)));
    Value::from(pairs.collect::<BTreeMap<_, _>>())
}

/// Bytes as text; what is not UTF-8 is replaced.
fn text(bytes: &[u8]) -> Value {
    Value::from(String::from_utf8_lossy(bytes).into_owned())
}

fn displayed(array: &dyn Array, index: usize) -> Value {
    let options = FormatOptions::default();
    match ArrayFormatter::try_new(array, &options) {
        Ok(formatter) => formatter.value(index).try_to_string().map_or(Value::from(()), Value::from),
        Err(_) => Value::from(()),
    }
}

#[cfg(test)]
mod tests;
