//! Sizes as people write them: `512`, `4k`, `1.5G`, `10MiB`, `8s`; binary units throughout.

use std::fmt;

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SizeError {
    text: String,
    why: &'static str,
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "'{}' is not a size: {} (allowed: a number with b, s, k, M, G, T, P or E, such as 512, 4k, 1.5G, 10MiB)",
            crate::util::text::printable(&self.text),
            self.why
        )
    }
}

impl std::error::Error for SizeError {}

/// Most digits of a fraction that count: with them a part of 1 EiB still fits 128 bits.
const MAX_FRACTION: usize = 20;

/// Bytes that `text` stands for.
///
/// A unit is `b` (bytes), `s` (512-byte sectors), or one of `k M G T P E` in either case, alone or
/// followed by `B` or `iB`; all are powers of 1024.  A fraction is allowed with a unit above bytes,
/// where it comes out as whole bytes or is rounded down to them, and where it is zero.
///
/// # Errors
/// No number, an unknown unit, a negative number, or more than 2^63 - 1 bytes.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let fail = |why| SizeError {
        text: text.to_owned(),
        why,
    };
    let (number, unit) = split_unit(text.trim());
    let unit = unit_bytes(unit).ok_or_else(|| fail("the unit is unknown"))?;
    if let Some(hex) = number
        .strip_prefix("0x")
        .or_else(|| number.strip_prefix("0X"))
    {
        let value = u64::from_str_radix(hex, 16).map_err(|_| fail("the number is not one"))?;
        return checked(u128::from(value) * u128::from(unit)).ok_or_else(|| fail("too large"));
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if matches!(number, "" | ".") || !digits(whole) || !digits(fraction) {
        return Err(fail("the number is not one"));
    }
    let fraction = fraction.trim_end_matches('0');
    // Digits past these are less than a byte of the largest unit.
    let fraction = fraction.get(..MAX_FRACTION).unwrap_or(fraction);
    if !fraction.is_empty() && unit == 1 {
        return Err(fail("there are no fractions of a byte"));
    }
    let whole = if whole.is_empty() { "0" } else { whole };
    let whole: u64 = whole.parse().map_err(|_| fail("too large"))?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let part: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().unwrap_or(0)
    };
    let bytes = u128::from(whole) * u128::from(unit) + part * u128::from(unit) / scale;
    checked(bytes).ok_or_else(|| fail("too large"))
}

fn checked(bytes: u128) -> Option<u64> {
    u64::try_from(bytes)
        .ok()
        .filter(|&b| i64::try_from(b).is_ok())
}

fn split_unit(text: &str) -> (&str, &str) {
    let hex = text.starts_with("0x") || text.starts_with("0X");
    let is_number = |(i, c): &(usize, char)| {
        c.is_ascii_digit() || *c == '.' || (hex && (*i == 1 || c.is_ascii_hexdigit()))
    };
    let end = text.char_indices().take_while(is_number).count();
    text.split_at(end)
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let lower = unit.to_ascii_lowercase();
    let power = match lower.as_str() {
        "" | "b" => return Some(1),
        "s" => return Some(512),
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        "p" | "pb" | "pib" => 5,
        "e" | "eb" | "eib" => 6,
        _ => return None,
    };
    Some(1u64 << (10 * power))
}

/// `bytes` as people read them: three digits and a binary unit, such as `1.5 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut scaled = u128::from(bytes) * 1000;
    while scaled >= 1000 * 1000 && unit + 1 < UNITS.len() {
        scaled = scaled
            .div_ceil(1024)
            .min(scaled / 1024 + u128::from(scaled % 1024 >= 512));
        unit += 1;
    }
    let number = match scaled {
        s if s < 10_000 => trim(format!("{}.{:02}", s / 1000, s % 1000 / 10)),
        s if s < 100_000 => trim(format!("{}.{}", s / 1000, s % 1000 / 100)),
        s => (s / 1000).to_string(),
    };
    format!("{number} {}", UNITS[unit])
}

fn trim(number: String) -> String {
    if !number.contains('.') {
        return number;
    }
    number
        .trim_end_matches('0')
        .trim_end_matches('.')
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_size_is_understood() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("8s", 4096),
            ("4k", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("4kb", 4096),
            ("1.5G", 1_610_612_736),
            ("10MiB", 10 << 20),
            ("2T", 2 << 40),
            ("0x1000", 4096),
            ("0.5k", 512),
            (".5k", 512),
            ("1024.0b", 1024),
            ("1024.", 1024),
            ("1.000", 1),
            ("1.50000000000000000000000000k", 1536),
            ("0.3333333333333333333333333333E", 384_307_168_202_282_325),
            ("7E", 7 << 60),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in [
            "",
            "k",
            ".",
            ".k",
            "-1",
            "1x",
            "1.5",
            "8E",
            "1.2.3G",
            "1.0000000000000000000000001",
            "99999999999999999999",
            "1 000",
            "0x",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_with_three_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 20, "10 MiB"),
            (136_365_211_648, "127 GiB"),
            (2 << 40, "2 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human(bytes), text);
        }
    }
}
