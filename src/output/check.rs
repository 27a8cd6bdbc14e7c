//! `check`: what was found and what was done about it.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

use crate::image::check::{BadSector, Finding, Report, Severity};
use crate::output::json as output_json;
use crate::util::text::printable;

/// Writes the findings and a summary in qemu-img's words.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    for finding in &report.findings {
        writeln!(out, "{}", line(finding))?;
    }
    if !report.findings.is_empty() {
        writeln!(out)?;
    }
    if report.leaks_fixed + report.corruptions_fixed > 0 {
        writeln!(
            out,
            "The following inconsistencies were found and repaired:\n\n    \
             {} leaked clusters\n    {} corruptions\n",
            report.leaks_fixed, report.corruptions_fixed
        )?;
    }
    verdict(out, report)?;
    if report.total_clusters > 0 {
        writeln!(out, "{}", statistics(report))?;
    }
    if report.image_end_offset > 0 {
        writeln!(out, "Image end offset: {}", report.image_end_offset)?;
    }
    Ok(())
}

/// Writes one object with the keys that qemu-img has, all of them, and the findings.
///
/// # Errors
/// The writer's.
pub fn json(out: &mut dyn Write, path: &Path, format: &str, report: &Report) -> io::Result<()> {
    output_json::write(out, &value(path, format, report))
}

/// Writes one object with one such object for each image of a chain.
///
/// # Errors
/// The writer's.
pub fn json_chain(out: &mut dyn Write, images: &[Value]) -> io::Result<()> {
    output_json::write(out, &json!({ "images": images }))
}

/// Writes the line that begins what is said of the image of a chain with this number.
///
/// # Errors
/// The writer's.
pub fn title(out: &mut dyn Write, index: usize, path: &Path) -> io::Result<()> {
    let space = if index > 0 { "\n" } else { "" };
    writeln!(out, "{space}image: {}", printable(path))
}

/// What is said of one image.
pub fn value(path: &Path, format: &str, report: &Report) -> Value {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|f| json!({ "severity": word(f.severity), "text": f.text, "repaired": f.repaired }))
        .collect();
    let mut value = json!({
        "image-end-offset": report.image_end_offset,
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
        "check-errors": report.check_errors,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "filename": output_json::path(path),
        "format": format,
        "findings": findings,
    });
    if let (Some(sectors), Some(object)) = (&report.sectors, value.as_object_mut()) {
        let sector =
            |s: &BadSector| json!({ "lba": s.lba, "parts": s.parts, "correctable": s.correctable });
        object.insert("sectors".to_owned(), sectors.iter().map(sector).collect());
    }
    value
}

/// One finding as one line.
pub fn line(finding: &Finding) -> String {
    let mut line = format!("{}: {}", word(finding.severity), printable(&finding.text));
    if let Some(done) = &finding.repaired {
        line.push_str("; repaired: ");
        line.push_str(&printable(done));
    }
    line
}

fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Leak => "leak",
        Severity::Corruption => "corruption",
        Severity::Note => "note",
    }
}

fn verdict(out: &mut dyn Write, report: &Report) -> io::Result<()> {
    if report.corruptions > 0 {
        writeln!(
            out,
            "{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.",
            report.corruptions
        )?;
    }
    if report.leaks > 0 {
        writeln!(
            out,
            "{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.",
            report.leaks
        )?;
    }
    if report.check_errors > 0 {
        writeln!(
            out,
            "{} internal errors have occurred during the check.",
            report.check_errors
        )?;
    }
    if report.corruptions + report.leaks + report.check_errors == 0 {
        writeln!(out, "No errors were found on the image.")?;
    }
    Ok(())
}

fn statistics(report: &Report) -> String {
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    format!(
        "{allocated}/{total} = {}% allocated, {}% fragmented, {}% compressed clusters",
        percent(allocated, total),
        percent(report.fragmented_clusters, allocated),
        percent(report.compressed_clusters, allocated)
    )
}

/// `part` of `whole` in per cent with two digits.
fn percent(part: u64, whole: u64) -> String {
    let whole = u128::from(whole).max(1);
    let hundredths = (u128::from(part) * 10_000 + whole / 2) / whole;
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(report: &Report) -> String {
        let mut out = Vec::new();
        human(&mut out, report).expect("memory has room");
        String::from_utf8(out).expect("is text")
    }

    #[test]
    fn a_clean_image_reads_as_in_qemu_img() {
        let report = Report {
            total_clusters: 160,
            allocated_clusters: 1,
            image_end_offset: 393_216,
            ..Report::default()
        };
        assert_eq!(
            text(&report),
            "No errors were found on the image.\n\
             1/160 = 0.63% allocated, 0.00% fragmented, 0.00% compressed clusters\n\
             Image end offset: 393216\n"
        );
    }

    #[test]
    fn findings_say_how_bad_they_are_and_what_was_done() {
        let mut report = Report::default();
        report.add(Severity::Corruption, 1, "bad\x1b word".to_owned(), None);
        report.add(
            Severity::Leak,
            2,
            "lost".to_owned(),
            Some("given back".to_owned()),
        );
        let text = text(&report);
        for part in [
            "corruption: bad\\u{1b} word\n",
            "leak: lost; repaired: given back\n",
            "1 errors were found",
            "    2 leaked clusters\n",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn json_has_all_keys_even_where_they_are_zero() {
        let mut out = Vec::new();
        json(&mut out, Path::new("a"), "vhd", &Report::default()).expect("memory has room");
        let value: Value = serde_json::from_slice(&out).expect("is JSON");
        for key in ["corruptions", "leaks", "check-errors", "leaks-fixed"] {
            assert_eq!(value[key], 0, "{key}");
        }
        assert_eq!(value["format"], "vhd");
    }
}
