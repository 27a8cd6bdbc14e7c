//! Limits as people write them: `bps=10M,iops-rd=500,iops-rd-burst=2000,size=64k`.

use super::{Error, Key, Limits, Rate, Result};
use crate::util::size;
use crate::util::text::printable;

/// Largest rate, in bytes or requests a second: far above any device, far below where sums of
/// floating point lose units.
const MAX_RATE: u64 = 1_000_000_000_000_000;

/// Longest burst in seconds.
const MAX_SECONDS: u64 = 86_400;

/// What was written for one key.
#[derive(Default, Clone, Copy)]
struct Typed {
    average: Option<u64>,
    burst: Option<u64>,
    seconds: Option<u64>,
}

impl Limits {
    /// The limits that `pairs` (`KEY=VALUE`) name.
    ///
    /// # Errors
    /// `Invalid`, naming the key: an unknown one, a value out of range, a total beside a limit of
    /// the same kind for reads or writes, a burst below its average.
    pub fn parse<'a>(pairs: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut typed = [Typed::default(); Key::ALL.len()];
        let mut op_size = None;
        for pair in pairs.filter(|p| !p.is_empty()) {
            let (name, text) = pair
                .split_once('=')
                .ok_or_else(|| Error::invalid(format!("'{}' is not KEY=VALUE", printable(pair))))?;
            let value = number(name, text)?;
            if name == "size" {
                op_size = Some(value);
                continue;
            }
            let (typed, part) = place(&mut typed, name).ok_or_else(|| unknown(name))?;
            match part {
                "" => typed.average = Some(value),
                "-burst" => typed.burst = Some(value),
                _ if value > MAX_SECONDS => {
                    let text = format!("{name} is {value} (allowed: up to {MAX_SECONDS} seconds)");
                    return Err(Error::invalid(text));
                }
                _ => typed.seconds = Some(value),
            }
        }
        let mut limits = Self {
            op_size,
            ..Self::default()
        };
        for (key, typed) in Key::ALL.into_iter().zip(typed) {
            limits.rates[key as usize] = rate(key, typed)?;
        }
        limits.check()?;
        Ok(limits)
    }

    fn check(&self) -> Result<()> {
        for (total, parts) in [
            (Key::Bps, [Key::BpsRead, Key::BpsWrite]),
            (Key::Iops, [Key::IopsRead, Key::IopsWrite]),
        ] {
            for part in parts {
                if self.rate(total).is_some() && self.rate(part).is_some() {
                    return Err(Error::invalid(format!(
                        "{} and {} cannot both be given: one is for all, one for a part",
                        total.name(),
                        part.name()
                    )));
                }
            }
        }
        let iops = [Key::Iops, Key::IopsRead, Key::IopsWrite];
        if self.op_size.is_some() && iops.iter().all(|key| self.rate(*key).is_none()) {
            return Err(Error::invalid(
                "size says what counts as a request, and no iops are limited",
            ));
        }
        Ok(())
    }
}

fn number(name: &str, text: &str) -> Result<u64> {
    let value =
        size::parse(text).map_err(|e| Error::invalid(format!("{}: {e}", printable(name))))?;
    match value {
        1..=MAX_RATE => Ok(value),
        _ => Err(Error::invalid(format!(
            "{} is {value} (allowed: 1 to {MAX_RATE})",
            printable(name)
        ))),
    }
}

/// Where what follows `name` belongs, and which part of it: `""`, `-burst` or `-burst-length`.
fn place<'t, 'n>(typed: &'t mut [Typed; 6], name: &'n str) -> Option<(&'t mut Typed, &'n str)> {
    let found = Key::ALL.into_iter().find_map(|key| {
        let part = name.strip_prefix(key.name())?;
        matches!(part, "" | "-burst" | "-burst-length").then_some((key, part))
    });
    found.map(|(key, part)| (&mut typed[key as usize], part))
}

fn unknown(name: &str) -> Error {
    let keys = Key::ALL.map(Key::name).join(", ");
    Error::invalid(format!(
        "'{}' is not a limit (allowed: {keys}, each with -burst and -burst-length; size, group)",
        printable(name)
    ))
}

fn rate(key: Key, typed: Typed) -> Result<Option<Rate>> {
    let name = key.name();
    let Some(average) = typed.average else {
        return match typed.burst.or(typed.seconds) {
            None => Ok(None),
            Some(_) => Err(Error::invalid(format!(
                "a burst of {name} is given, but no {name}"
            ))),
        };
    };
    match (typed.burst, typed.seconds) {
        (Some(burst), _) if burst < average => Err(Error::invalid(format!(
            "{name}-burst is {burst} (allowed: at least {name}, {average})"
        ))),
        (None, Some(_)) => Err(Error::invalid(format!(
            "{name}-burst-length is given, but no {name}-burst"
        ))),
        (burst, seconds) => Ok(Some(Rate {
            average,
            burst,
            burst_seconds: seconds.unwrap_or(1),
        })),
    }
}
