//! `lint`: which rules an image keeps.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

use crate::formats::profiles::{Profile, Rule, Verdict};
use crate::output::json as output_json;
use crate::output::table;
use crate::util::text::printable;

/// What became of one rule.
#[derive(Debug)]
pub struct Finding {
    /// The rule.
    pub rule: &'static Rule,
    /// What became of it.
    pub verdict: Verdict,
}

/// Writes a row for each rule that is about such an image.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, findings: &[Finding]) -> io::Result<()> {
    let mut rows = table::plain();
    rows.set_header(["STATE", "RULE", "WHAT", "SOURCE"]);
    for Finding { rule, verdict } in findings {
        let (state, found) = match verdict {
            Verdict::Keeps => ("keeps", String::new()),
            Verdict::Breaks(found) => ("BREAKS", format!(" (found: {})", printable(found))),
            Verdict::Silent => continue,
        };
        let own = match rule.is_makers_own {
            true => "",
            false => " (not the maker's own text)",
        };
        let (what, source) = (
            format!("{}{found}", rule.text),
            format!("{}{own}", rule.source),
        );
        rows.add_row([state, rule.name, &what, &source]);
    }
    table::write(out, rows)
}

/// Writes one object with a list of all rules.
///
/// # Errors
/// The writer's.
pub fn json(
    out: &mut dyn Write,
    place: &Profile,
    path: &Path,
    findings: &[Finding],
) -> io::Result<()> {
    let breaks = |f: &&Finding| matches!(f.verdict, Verdict::Breaks(_));
    let rules: Vec<Value> = findings.iter().map(rule).collect();
    let value = json!({
        "filename": output_json::path(path),
        "for": place.name,
        "breaks": findings.iter().filter(breaks).count(),
        "rules": rules,
    });
    output_json::write(out, &value)
}

fn rule(finding: &Finding) -> Value {
    let Finding { rule, verdict } = finding;
    let (state, found) = match verdict {
        Verdict::Keeps => ("keeps", None),
        Verdict::Breaks(found) => ("breaks", Some(found.as_str())),
        Verdict::Silent => ("silent", None),
    };
    let mut value = json!({
        "rule": rule.name,
        "state": state,
        "text": rule.text,
        "source": rule.source,
        "makers-own-text": rule.is_makers_own,
    });
    if let Some(found) = found {
        value["found"] = found.into();
    }
    value
}
