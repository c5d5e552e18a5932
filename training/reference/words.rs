use std::collections::HashMap;
use std::io::{self, BufRead};

/// Count how often each word occurs, ignoring case and punctuation.
fn count(line: &str, counts: &mut HashMap<String, usize>) {
    for word in line.split_whitespace() {
        let word: String = word.chars().filter(|c| c.is_alphanumeric()).collect();
        if !word.is_empty() {
            *counts.entry(word.to_lowercase()).or_insert(0) += 1;
        }
    }
}

fn main() -> io::Result<()> {
    let mut counts = HashMap::new();
    for line in io::stdin().lock().lines() {
        count(&line?, &mut counts);
    }
    let mut sorted: Vec<_> = counts.into_iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    for (word, n) in sorted.iter().take(10) {
        println!("{n:>6} {word}");
    }
    Ok(())
}
