//! Status and statistics of a serving process, for people.

use std::io::{self, Write};

use serde_json::Value;

use crate::util::text::printable;

/// Writes a report as lines of `key: value`, what belongs together indented; a histogram in one
/// line.
///
/// # Errors
/// The writer's.
pub fn write(out: &mut dyn Write, value: &Value) -> io::Result<()> {
    fields(out, value, 0)
}

fn fields(out: &mut dyn Write, value: &Value, depth: usize) -> io::Result<()> {
    let Value::Object(map) = value else {
        return Ok(());
    };
    let indent = "  ".repeat(depth);
    for (key, value) in map {
        match value {
            Value::Null => {}
            Value::String(text) if text.is_empty() => {}
            Value::Object(inner) if inner.is_empty() => {}
            Value::Object(_) => {
                writeln!(out, "{indent}{}:", printable(key))?;
                fields(out, value, depth + 1)?;
            }
            Value::Array(items) if items.is_empty() => {}
            Value::Array(items) if key == "histogram" => {
                let classes: Vec<String> = items.iter().map(class).collect();
                writeln!(out, "{indent}histogram: {}", classes.join(", "))?;
            }
            Value::Array(items) => {
                for item in items {
                    writeln!(out, "{indent}{}:", printable(key.trim_end_matches('s')))?;
                    fields(out, item, depth + 1)?;
                }
            }
            Value::String(text) => writeln!(out, "{indent}{key}: {}", printable(text))?,
            other => writeln!(out, "{indent}{key}: {other}")?,
        }
    }
    Ok(())
}

/// A class of a histogram: how many took less than so long.
fn class(value: &Value) -> String {
    let count = value.get("count").and_then(Value::as_u64).unwrap_or(0);
    match value.get("below-ns").and_then(Value::as_u64) {
        Some(below) => format!("{count} below {:?}", std::time::Duration::from_nanos(below)),
        None => format!("{count} longer"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_is_lines_with_what_belongs_together_indented() {
        let value = json!({
            "pid": 7,
            "exports": [{
                "name": "a\u{1b}",
                "address": null,
                "read": {
                    "operations": 2,
                    "histogram": [
                        { "below-ns": 8000, "count": 1 },
                        { "below-ns": null, "count": 1 },
                    ],
                },
            }],
        });
        let mut text = Vec::new();
        write(&mut text, &value).expect("memory takes it");
        let text = String::from_utf8(text).expect("is text");
        let expected = "pid: 7\nexport:\n  name: a\\u{1b}\n  read:\n    operations: 2\n    \
                        histogram: 1 below 8µs, 1 longer\n";
        assert_eq!(text, expected);
    }
}
