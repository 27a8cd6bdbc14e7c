//! Records of pax: `LENGTH KEY=VALUE\n`, where the length counts all of it.

/// Most records of one header.
const MAX_COUNT: usize = 1000;

/// What records say that matters here.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    /// The member is sparse, as GNU tar has it.
    pub(super) sparse: bool,
}

impl Records {
    /// # Errors
    /// What is wrong with them.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut records = Self::default();
        let mut rest = bytes;
        let mut count = 0;
        while !rest.is_empty() {
            count += 1;
            if count > MAX_COUNT {
                return Err(format!("more than {MAX_COUNT} records of pax"));
            }
            let (record, after) = split(rest).ok_or_else(|| {
                let at = bytes.len() - rest.len();
                format!("the record of pax {at} bytes into its header is not 'LENGTH KEY=VALUE'")
            })?;
            records.take(record)?;
            rest = after;
        }
        Ok(records)
    }

    fn take(&mut self, (key, value): (&[u8], &[u8])) -> Result<(), String> {
        match key {
            b"path" if value.contains(&0) => Err("a name with a zero byte in it".to_owned()),
            b"path" if crate::util::align::len64(value.len()) > super::MAX_NAME => Err(format!(
                "a name of {} bytes (allowed: {})",
                value.len(),
                super::MAX_NAME
            )),
            b"path" => {
                self.path = Some(value.to_vec());
                Ok(())
            }
            b"size" => {
                let size = decimal(value);
                let shown = value.escape_ascii();
                let size = size.ok_or_else(|| format!("a size of '{shown}' in a record of pax"))?;
                self.size = Some(size);
                Ok(())
            }
            key => {
                self.sparse |= key.starts_with(b"GNU.sparse.");
                Ok(())
            }
        }
    }
}

type Record<'a> = (&'a [u8], &'a [u8]);

/// The first record, and what follows it.
fn split(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let blank = bytes.iter().take(8).position(|b| *b == b' ')?;
    let len = usize::try_from(decimal(&bytes[..blank])?).ok()?;
    let record = bytes.get(..len)?.get(blank + 1..)?;
    let record = record.strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    Some(((&record[..equals], &record[equals + 1..]), &bytes[len..]))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_by_their_lengths() {
        let records = Records::parse(b"12 path=a\nb\n12 size=123\n").expect("are right");
        assert_eq!(records.path.as_deref(), Some(&b"a\nb"[..]));
        assert_eq!(records.size, Some(123));
        for wrong in [
            &b"0 size=1\n"[..],
            b"9 size=1\n9 size=1",
            b"11 size=1\n",
            b"8 size=1\n",
            b"9999999999 size=1\n",
            b"x size=1\n",
            b"39 size=999999999999999999999999999999\n",
            b"11 size=-1\n",
            b"7 size\n",
        ] {
            Records::parse(wrong).expect_err("is wrong");
        }
        let many = b"9 size=1\n".repeat(MAX_COUNT + 1);
        Records::parse(&many).expect_err("are too many");
    }
}
