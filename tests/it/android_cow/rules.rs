//! Rules that a stranger found broken.

use super::made::{BLOCK, Do, Plan, text};
use super::{chain, checked, content, refused};
use crate::android_cow::write::made;
use crate::util::{Seeded, rounds};

/// The kinds of operations of a file of version 3 that vdtool made, in order.
fn kinds(file: &[u8]) -> Vec<u8> {
    let quad = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("eight"));
    let count = usize::try_from(quad(54)).expect("small");
    let first = 78 + (2 << 20) + 4 * 16;
    let info = |n: usize| quad(first + n * 16 + 8);
    (0..count).map(|n| (info(n) >> 60) as u8).collect()
}

#[test]
fn files_of_version_3_have_what_reads_the_old_disk_before_all_else() {
    let mut rng = Seeded::new("cow-third-order");
    for round in 0..rounds(20) {
        let mut old = text(&mut rng, 64 * BLOCK);
        let mut new = old.clone();
        for block in 0..64 {
            let part = block * BLOCK..(block + 1) * BLOCK;
            match rng.u8(0..6) {
                // Close by bytes, and shorter as it is.
                0 => {
                    let noise = rng.bytes(800);
                    old[part.clone()].fill(b'A');
                    old[part.start..part.start + 800].copy_from_slice(&noise);
                    new[part].fill(b'A');
                }
                1 => new[part.start + 9] ^= 1,
                2 => new[part].fill(0),
                3 => {
                    let from = rng.usize(0..64) * BLOCK;
                    let other = old[from..from + BLOCK].to_vec();
                    new[part].copy_from_slice(&other);
                }
                4 => rng.fill(&mut new[part]),
                _ => {}
            }
        }
        for compression in ["lz4", "zstd", "gz"] {
            let options = format!("version=3,compression={compression}");
            let file = made(&old, &new, &options, 2).expect("is made");
            let kinds = kinds(&file);
            let reads = |kind: &u8| [1, 6].contains(kind);
            let first = kinds.iter().position(|kind| !reads(kind));
            let behind = &kinds[first.unwrap_or(kinds.len())..];
            assert!(!behind.iter().any(reads), "round {round}: {kinds:?}");
            let report = checked(&file);
            assert_eq!(report.corruptions, 0, "{report:?}");
            let found = content(&chain(&[&file], &old, None).expect("opens"));
            assert!(found.expect("reads") == new, "round {round}");
        }
    }
}

#[test]
fn a_label_of_a_file_that_is_partly_merged_is_refused_where_it_would_mislead() {
    let mut rng = Seeded::new("cow-label-merged");
    let base = text(&mut rng, 8 * BLOCK);
    let block = text(&mut rng, BLOCK);
    for (version, refuses) in [(2, true), (3, false)] {
        let mut plan = Plan::new(version, 0);
        plan.add(5, Do::Copy(4))
            .add(0, Do::Replace(block.clone()))
            .add(0, Do::Label(1))
            .add(3, Do::Copy(2));
        plan.merged = 1;
        let file = plan.bytes(&base);
        let found = chain(&[&file], &base, Some(1));
        assert_eq!(found.is_err(), refuses, "{version}");
        plan.merged = 0;
        let file = plan.bytes(&base);
        let found = chain(&[&file], &base, Some(1)).and_then(|c| content(&c));
        assert!(found.expect("reads")[..BLOCK] == block);
    }
}

#[test]
fn blocks_whose_source_a_merge_has_overwritten_are_errors_and_no_others() {
    let mut rng = Seeded::new("cow-lost");
    let base = text(&mut rng, 8 * BLOCK);
    let mut plan = Plan::new(3, 0);
    plan.add(1, Do::Copy(0))
        .add(2, Do::Copy(1))
        .add(4, Do::Copy(5));
    plan.merged = 1;
    let file = plan.bytes(&base);
    let told = refused(&file, &base);
    assert!(
        told.contains("block 2") && told.contains("overwritten"),
        "{told}"
    );
    let chain = chain(&[&file], &base, None).expect("opens");
    let mut found = vec![0; BLOCK];
    chain.read_at(&mut found, 4 * BLOCK as u64).expect("reads");
    assert!(found == base[5 * BLOCK..6 * BLOCK]);
}

#[test]
fn a_base_that_is_too_short_for_what_was_merged_into_it_is_refused() {
    let mut rng = Seeded::new("cow-short");
    let base = text(&mut rng, 6 * BLOCK);
    let block = text(&mut rng, BLOCK);
    let mut plan = Plan::new(3, 0);
    plan.add(7, Do::Replace(block));
    plan.merged = 1;
    let told = refused(&plan.bytes(&base), &base);
    assert!(told.contains("block 7") && told.contains("24576"), "{told}");
}

#[test]
fn sequence_data_of_more_blocks_than_operations_is_refused_before_it_is_read() {
    let mut plan = Plan::new(3, 0);
    plan.add(1, Do::Zero);
    let mut file = plan.bytes(&[]);
    file[38..46].copy_from_slice(&(1_u64 << 25).to_le_bytes());
    assert!(refused(&file, &[]).contains("sequence_data_count"));
    let mut plan = Plan::new(2, 0);
    plan.add(1, Do::Zero);
    let mut file = plan.bytes(&[]);
    file[38 + (2 << 20) + 2] = 9;
    assert!(refused(&file, &[0; 3 * BLOCK]).contains("9 bytes of data"));
}
